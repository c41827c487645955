// The page: its address says which images are shown, `#class=3&ids=4000-4999&page=2&image=4711`, and everything that
// can be chosen is a link or changes the address. Texts of the run go in as text only, never as HTML.
"use strict";

(() => {
  const PAGE_IMAGES = 120;
  const PAGE_CLASSES = 20;
  const CLASS_IMAGES = 12; // of each class in the overview
  const byId = (id) => document.getElementById(id);
  const number = new Intl.NumberFormat("en");
  let contents = null;
  let drawn = 0; // counts drawings: what is loaded for an earlier one is dropped
  let shown = {address: null, selection: null, images: []};

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  const plural = (count, one, many = `${one}s`) => `${number.format(count)} ${count === 1 ? one : many}`;
  const className = (label) => contents.classes[label] ?? String(label);
  const inWords = (image) => `image ${image.id}` + (image.label === null ? "" : `, class ${className(image.label)}`);

  // ---------------------------------------------------------------- the address

  function readAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    const natural = (name) => (/^\d{1,15}$/.test(given.get(name) ?? "") ? Number(given.get(name)) : null);
    const label = natural("class");
    return {
      label: label !== null && label < contents.classes.length ? label : null,
      all: given.get("class") === "all" || contents.classes.length === 0,
      ids: given.get("ids") ?? "",
      page: Math.max(1, natural("page") ?? 1),
      image: natural("image"),
    };
  }

  function addressOf({label, all, ids, page, image}) {
    const parts = [];
    if (label !== null) parts.push(`class=${label}`);
    else if (all && contents.classes.length) parts.push("class=all");
    if (ids) parts.push(`ids=${encodeURIComponent(ids)}`);
    if (page > 1) parts.push(`page=${page}`);
    if (image !== null) parts.push(`image=${image}`);
    return `#${parts.join("&")}`;
  }

  // A range of ids as people write it; null if it is none.
  function parseIds(text) {
    const plain = text.replace(/[\s,_']/g, "");
    if (plain === "") return {from: 0, to: Infinity};
    const found = /^(\d{1,15})(?:(?:-|\u2013|\.\.)(\d{1,15}))?$/.exec(plain);
    if (!found) return null;
    const [from, to] = [Number(found[1]), Number(found[2] ?? found[1])];
    return from <= to ? {from, to} : null;
  }

  // ---------------------------------------------------------------- pages of images

  async function show() {
    const address = readAddress();
    const samePage = shown.address && addressOf({...address, image: null}) === addressOf({...shown.address, image: null});
    if (!samePage) {
      const drawing = ++drawn;
      byId("class").value = address.label ?? (address.all || address.ids ? "all" : "overview");
      byId("ids").value = address.ids;
      byId("reset").hidden = addressOf({...address, page: 1, image: null}) === "#";
      const found = await pageOf(address);
      if (drawing !== drawn) return;
      shown = {address, ...found};
      showPage(found, drawing);
      if (address.page > 1 || address.label !== null) window.scrollTo(0, 0);
    }
    shown.address = address;
    if (address.image === null) closeDetail();
    else await openDetail(address);
  }

  // What is on the page of an address: sections of images.
  async function pageOf(address) {
    const range = parseIds(address.ids);
    if (range === null) {
      return {sections: [], images: [], problem: `"${address.ids}" is no id and no range such as 4000-4999.`};
    }
    if (address.label === null && !address.all && !address.ids) return overviewOf(address);
    const selection = await gallery.select({label: address.label, ...range});
    const numPages = Math.max(1, Math.ceil(selection.total / PAGE_IMAGES));
    const page = Math.min(address.page, numPages);
    const start = (page - 1) * PAGE_IMAGES;
    const images = await gallery.images(selection, start, PAGE_IMAGES);
    const all = address.ids ? `Ids ${address.ids}` : "All images";
    const title = address.label === null ? all : className(address.label);
    const end = start + images.length;
    return {
      selection, start, images, page, numPages,
      sections: [{title, images}],
      status: selection.total > images.length
        ? `${number.format(start + 1)} to ${number.format(end)} of ${plural(selection.total, "image")}`
        : plural(selection.total, "image"),
      problem: selection.total ? null : "No image of this gallery is in that choice.",
    };
  }

  async function overviewOf(address) {
    const numPages = Math.max(1, Math.ceil(contents.classes.length / PAGE_CLASSES));
    const page = Math.min(address.page, numPages);
    const first = (page - 1) * PAGE_CLASSES;
    const labels = contents.classes.map((_, label) => label).slice(first, first + PAGE_CLASSES);
    const sections = await Promise.all(labels.map(async (label) => {
      const selection = await gallery.select({label, from: 0, to: Infinity}, CLASS_IMAGES);
      const total = contents.blocks.reduce((sum, block) => sum + (block.counts ? block.counts[label] : 0), 0);
      return {title: className(label), label, total, images: await gallery.images(selection, 0, CLASS_IMAGES)};
    }));
    const classes = plural(contents.classes.length, "class", "classes");
    return {
      sections, page, numPages, selection: null,
      images: sections.flatMap((section) => section.images),
      status: numPages > 1
        ? `${number.format(first + 1)} to ${number.format(first + labels.length)} of ${classes}`
        : `The first ${CLASS_IMAGES} images of each class`,
      problem: null,
    };
  }

  function showPage({sections, status, problem, page, numPages}, drawing) {
    byId("status").textContent = status ?? "";
    byId("message").textContent = problem ?? "";
    byId("message").hidden = !problem;
    for (const pager of document.querySelectorAll(".pager")) fillPager(pager, page ?? 1, numPages ?? 1);
    byId("sections").replaceChildren(...sections.map((section) => sectionOf(section, drawing)));
  }

  function sectionOf({title, label, total, images}, drawing) {
    const heading = element("h2", {}, title);
    const section = element("section", {}, heading);
    if (label !== undefined) {
      const link = element("a", {class: "button"}, `All ${number.format(total)}`);
      link.href = addressOf({label, all: false, ids: "", page: 1, image: null});
      link.setAttribute("aria-label", `All ${plural(total, "image")} of class ${title}`);
      const row = element("div", {class: "section-head"}, heading);
      if (total > images.length) row.append(link);
      section.append(row);
    } else if (contents.classes.length === 0 || !images.length) {
      heading.className = "hidden";
    }
    section.append(element("ul", {class: "tiles"}, ...images.map((image) => tileOf(image, drawing))));
    return section;
  }

  function tileOf(image, drawing) {
    const canvas = element("canvas", {"aria-hidden": "true"});
    [canvas.height, canvas.width] = contents.thumbnail_size;
    const tile = element("a", {class: "tile", "aria-label": inWords(image)}, canvas);
    tile.append(element("span", {"aria-hidden": "true"}, String(image.id)));
    tile.dataset.id = image.id;
    tile.title = inWords(image);
    tile.href = addressOf({...readAddress(), image: image.id});
    gallery.draw(canvas, image).then((done) => {
      if (drawing === drawn) tile.classList.add(done ? "loaded" : "lost");
    });
    return element("li", {}, tile);
  }

  function fillPager(pager, page, numPages) {
    const link = (text, name, target) => {
      const made = element("a", {class: "button", "aria-label": name}, text);
      if (target >= 1 && target <= numPages && target !== page) {
        made.href = addressOf({...readAddress(), page: target, image: null});
      } else {
        made.setAttribute("aria-disabled", "true");
        made.setAttribute("role", "link");
      }
      return made;
    };
    const field = element("input", {type: "number", min: "1", max: String(numPages), "aria-label": "Page"});
    field.value = page;
    field.addEventListener("change", () => {
      const target = Math.min(numPages, Math.max(1, Math.round(Number(field.value)) || 1));
      location.hash = addressOf({...readAddress(), page: target, image: null});
    });
    pager.hidden = numPages === 1;
    pager.replaceChildren(
      link("\u00ab", "First page", 1), link("\u2039", "Previous page", page - 1),
      element("span", {class: "place"}, field, ` of ${number.format(numPages)}`),
      link("\u203a", "Next page", page + 1), link("\u00bb", "Last page", numPages),
    );
  }

  // ---------------------------------------------------------------- one image

  async function openDetail(address) {
    const image = shown.images.find(({id}) => id === address.image) ?? (await gallery.find(address.image));
    if (readAddress().image !== address.image) return;
    const dialog = byId("detail");
    shown.lastImage = address.image;
    byId("detail-title").textContent = `Image ${address.image}`;
    byId("command").textContent = contents.command + address.image;
    byId("copy").textContent = "Copy";
    const lineage = [...contents.lineage];
    if (image) {
      const own = [["Sample id", String(image.id)]];
      if (image.label !== null) own.push(["Class", className(image.label)], ["Label", String(image.label)]);
      if (image.inputs) own.push(["Input rows", image.inputs.join(", ")]);
      own.push(["Shard", image.shard]);
      lineage.unshift(...own);
    }
    fillFacts(byId("facts"), lineage);
    await showPicture(address, image);
    await linkBeside(address, image);
    if (!dialog.open) dialog.showModal();
  }

  async function showPicture(address, image) {
    const canvas = byId("picture");
    const [height, width] = contents.image_size;
    const [smallHeight, smallWidth] = contents.thumbnail_size;
    const isWhole = height === smallHeight && width === smallWidth;
    const drawnNow = image !== null && (await gallery.draw(canvas, image));
    canvas.hidden = !drawnNow;
    if (!drawnNow) {
      byId("caption").textContent = image
        ? "Its thumbnail is missing from the folder beside this page."
        : "This gallery does not have it: it was removed, was not made, or is beyond the images that are shown.";
      return;
    }
    const room = Math.min(384, window.innerWidth - 64);
    const scale = isWhole ? Math.max(1, Math.floor(room / Math.max(height, width))) : room / Math.max(height, width);
    canvas.style.width = `${Math.round(width * scale)}px`;
    canvas.style.height = `${Math.round(height * scale)}px`;
    canvas.setAttribute("aria-label", inWords(image));
    byId("caption").textContent = isWhole
      ? `${width} x ${height} pixels, each shown ${scale} times as large`
      : `Thumbnail of ${smallWidth} x ${smallHeight} pixels; the image of ${width} x ${height} is in its shard.`;
    if (isWhole) return;
    const whole = document.createElement("canvas"); // apart: by then another image may be shown
    if (!(await gallery.drawWhole(whole, image)) || readAddress().image !== address.image) return;
    [canvas.width, canvas.height] = [whole.width, whole.height];
    canvas.getContext("2d").drawImage(whole, 0, 0);
    byId("caption").textContent = `${whole.width} x ${whole.height} pixels, from its shard`;
  }

  // The images before and after this one, on other pages too where the page is a list.
  async function linkBeside(address, image) {
    const place = image ? shown.images.findIndex(({id}) => id === image.id) : -1;
    for (const [name, step] of [["previous", -1], ["next", 1]]) {
      let target = place < 0 ? null : shown.images[place + step];
      let page = address.page;
      if (place >= 0 && !target && shown.selection) {
        const index = shown.start + place + step;
        target = index < 0 ? null : (await gallery.images(shown.selection, index, 1))[0];
        page = Math.floor(index / PAGE_IMAGES) + 1;
      }
      const link = byId(name);
      if (target) link.href = addressOf({...address, page, image: target.id});
      else link.removeAttribute("href");
    }
  }

  function closeDetail() {
    if (!byId("detail").open) return;
    byId("detail").close();
    document.querySelector(`.tile[data-id="${shown.lastImage}"]`)?.focus();
  }

  function leaveDetail() {
    location.hash = addressOf({...readAddress(), image: null});
  }

  function fillFacts(list, facts) {
    list.replaceChildren(...facts.map(([name, value]) => {
      const isDigits = /[0-9a-f]{32}/.test(value); // a digest, or a key that holds one
      return element("div", {}, element("dt", {}, name), element("dd", isDigits ? {class: "digits"} : {}, value));
    }));
  }

  // ---------------------------------------------------------------- once

  function fillFilter() {
    const field = byId("class");
    const option = (value, text) => element("option", {value}, text);
    field.append(option("overview", "Overview"), option("all", "All, by id"));
    contents.classes.forEach((name, label) => field.append(option(String(label), `${label}: ${name}`)));
    byId("class-field").hidden = contents.classes.length === 0;
    byId("filter").hidden = false;
    const go = () => {
      const chosen = field.value;
      const label = /^\d+$/.test(chosen) ? Number(chosen) : null;
      location.hash = addressOf({label, all: chosen === "all", ids: byId("ids").value.trim(), page: 1, image: null});
    };
    field.addEventListener("change", go);
    byId("ids").addEventListener("change", go);
    byId("filter").addEventListener("submit", (event) => {
      event.preventDefault();
      go();
    });
    byId("reset").addEventListener("click", () => {
      byId("ids").value = "";
      location.hash = "#";
    });
  }

  function fillDetail() {
    const dialog = byId("detail");
    byId("close").addEventListener("click", leaveDetail);
    dialog.addEventListener("cancel", (event) => {
      event.preventDefault();
      leaveDetail();
    });
    dialog.addEventListener("click", (event) => event.target === dialog && leaveDetail());
    dialog.addEventListener("keydown", (event) => {
      const link = {ArrowLeft: "previous", ArrowRight: "next"}[event.key];
      if (link && byId(link).hasAttribute("href")) location.replace(byId(link).href);
    });
    const copy = byId("copy");
    copy.hidden = !navigator.clipboard;
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(byId("command").textContent);
        copy.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(byId("command"));
      }
    });
  }

  async function begin() {
    contents = await gallery.open();
    const more = contents.num_images - contents.total;
    const classes = contents.classes.length ? ` of ${plural(contents.classes.length, "class", "classes")}` : "";
    byId("summary").textContent = `${plural(contents.total, "image")}${classes}` +
      (more > 0 ? `, the first of ${number.format(contents.num_images)} in this run` : "");
    const named = new Map(contents.lineage);
    byId("by").textContent = ["Model", "Sampler"].map((name) => named.get(name)).join(" \u00b7 ");
    document.title = `Gallery of ${named.get("Model")}`;
    const isWhole = String(contents.image_size) === String(contents.thumbnail_size);
    document.body.classList.toggle("pixels", isWhole);
    fillFacts(document.querySelector("#run dl"), contents.lineage);
    fillFilter();
    fillDetail();
    byId("skip").addEventListener("click", (event) => {
      event.preventDefault(); // the part behind # is the choice of images
      byId("images").focus();
    });
    await show();
    window.addEventListener("hashchange", () => show().catch(fail));
  }

  function fail(error) {
    byId("message").textContent = error.message;
    byId("message").hidden = false;
    byId("summary").textContent = contents ? byId("summary").textContent : "Nothing to show";
  }

  begin().catch(fail);
})();
