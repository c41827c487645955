// What the page knows of the run: files of data, loaded as they are needed, and which images a filter chooses.
//
// Data come as scripts that call `gallery.deliver`, because a page from disk may load scripts and pictures only.
"use strict";

const gallery = (() => {
  const MAX_BLOCKS = 64; // that stay in memory: 8,192 images each
  const MAX_SHEETS = 64; // decoded, 2 MiB each at most
  const waiting = new Map();
  const blocks = new Map();
  const sheets = new Map();
  let contents = null;

  // Called by each file of data.
  function deliver(file, data) {
    const resolve = waiting.get(file);
    waiting.delete(file);
    if (resolve) resolve(data);
  }

  function load(file) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      const fail = () => {
        waiting.delete(file);
        script.remove();
        reject(new Error(`gallery/${file} is missing or cannot be read; copy the whole folder beside this page`));
      };
      waiting.set(file, (data) => {
        script.remove();
        resolve(data);
      });
      script.addEventListener("error", fail);
      script.addEventListener("load", () => waiting.has(file) && fail());
      script.src = `gallery/${file}`;
      document.head.append(script);
    });
  }

  // The value of a key that is made once; of the others the most recently used stay. What fails is tried again.
  function remembered(cache, limit, key, make) {
    const value = cache.get(key) ?? make();
    cache.delete(key);
    cache.set(key, value);
    value.catch(() => cache.delete(key));
    if (cache.size > limit) cache.delete(cache.keys().next().value);
    return value;
  }

  async function open() {
    contents = await load("contents.js");
    contents.total = contents.blocks.reduce((sum, block) => sum + block.count, 0);
    return contents;
  }

  function block(index) {
    const name = contents.blocks[index].name;
    return remembered(blocks, MAX_BLOCKS, index, async () => prepared(await load(`${name}/block.js`)));
  }

  // Ids one by one, and where on the sheets each thumbnail is: they stand in the order of (label, id).
  function prepared({ids: runs, labels, inputs, places: bytes, shards}) {
    const ids = runs.flatMap(([first, count]) => Array.from({length: count}, (_, k) => first + k));
    const order = ids.map((_, k) => k);
    if (labels) order.sort((a, b) => labels[a] - labels[b] || a - b);
    const places = new Uint16Array(ids.length);
    order.forEach((k, place) => (places[k] = place));
    return {ids, labels, inputs, bytes, shards, places};
  }

  // Which images of a block a filter chooses, by their place in it.
  function matches({ids, labels}, {label, from, to}) {
    const found = [];
    ids.forEach((id, k) => {
      if (id >= from && id <= to && (label === null || labels[k] === label)) found.push(k);
    });
    return found;
  }

  // How many images a filter {label, from, to} chooses, block by block. Of blocks that it cuts the data are loaded,
  // at most two; all others are counted by the contents. `enough`: stop when there are so many.
  async function select(filter, enough = Infinity) {
    const parts = [];
    let total = 0;
    for (const [index, {first, last, count, counts}] of contents.blocks.entries()) {
      if (last < filter.from || first > filter.to) continue;
      if (total >= enough) break;
      let chosen = filter.label === null ? count : counts ? counts[filter.label] : 0;
      if (chosen && (first < filter.from || last > filter.to)) chosen = matches(await block(index), filter).length;
      if (chosen) parts.push({index, start: total, count: chosen});
      total += chosen;
    }
    return {filter, parts, total};
  }

  // Some of the images that were selected, by their place among them.
  async function images(selection, start, count) {
    const end = Math.min(start + count, selection.total);
    const parts = selection.parts.filter((part) => part.start < end && part.start + part.count > start);
    const found = await Promise.all(parts.map(async (part) => {
      const data = await block(part.index);
      return matches(data, selection.filter)
        .slice(Math.max(0, start - part.start), end - part.start)
        .map((k) => image(part.index, data, k));
    }));
    return found.flat();
  }

  // The image of an id; null if the gallery does not have it.
  async function find(id) {
    const index = contents.blocks.findIndex(({first, last}) => first <= id && id <= last);
    if (index < 0) return null;
    const data = await block(index);
    const k = data.ids.indexOf(id);
    return k < 0 ? null : image(index, data, k);
  }

  function image(index, data, k) {
    let shard = 0;
    for (let left = k; left >= data.shards[shard][1]; shard += 1) left -= data.shards[shard][1];
    return {
      id: data.ids[k],
      label: data.labels ? data.labels[k] : null,
      inputs: data.inputs ? data.inputs[k] : null,
      shard: data.shards[shard][0],
      bytes: data.bytes ? data.bytes[k] : null,
      block: index,
      place: data.places[k],
    };
  }

  // Draw an image's thumbnail, pixel by pixel; false if its sheet cannot be loaded.
  async function draw(canvas, {block: index, place}) {
    const [height, width] = contents.thumbnail_size;
    const number = Math.floor(place / contents.sheet_images);
    const cell = place % contents.sheet_images;
    const file = `gallery/${contents.blocks[index].name}/${String(number).padStart(2, "0")}.webp`;
    const sheet = await remembered(sheets, MAX_SHEETS, file, async () => {
      const picture = new Image();
      picture.src = file;
      await picture.decode();
      return picture;
    }).catch(() => null);
    if (sheet === null) return false;
    const [column, row] = [cell % contents.sheet_columns, Math.floor(cell / contents.sheet_columns)];
    canvas.width = width;
    canvas.height = height;
    canvas.getContext("2d").drawImage(sheet, column * width, row * height, width, height, 0, 0, width, height);
    return true;
  }

  // Draw an image in its full size, out of its shard beside this page: the bytes of its PNG alone are asked for. False
  // where that cannot be: pages from disk may not, and some servers send whole files only.
  async function drawWhole(canvas, {shard, bytes}) {
    if (bytes === null || !location.protocol.startsWith("http")) return false;
    const [first, length] = bytes;
    const stop = new AbortController();
    try {
      const headers = {Range: `bytes=${first}-${first + length - 1}`};
      const answer = await fetch(encodeURI(shard), {headers, signal: stop.signal});
      if (answer.status !== 206) {
        stop.abort();
        return false;
      }
      const picture = await createImageBitmap(await answer.blob());
      canvas.width = picture.width;
      canvas.height = picture.height;
      canvas.getContext("2d").drawImage(picture, 0, 0);
      return true;
    } catch {
      return false;
    }
  }

  return {deliver, open, select, images, find, draw, drawWhole};
})();
