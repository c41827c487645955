"""What a folder of images holds: which files are images, of which class and split, and what is left out.

The rules:
    - A file is taken for an image by the end of its name, whatever its case (IMAGE_EXTENSIONS). Other files are ignored
      and counted by their endings.
    - Hidden files and folders (".*"), and what systems, NAS devices and archivers leave behind (LEFTOVERS), are passed
      over and counted.
    - `exclude`: globs as of fnmatch, whose "*" also takes "/". One without "/" is compared with each name on a file's
      path, its own and its folders'; one with "/" with the path below the source, and with that of each folder on it.
    - Sub-folders are classes, whatever lies deeper in them; without sub-folders there are no classes. Two names that
      are one name in Unicode (NFC) are one class, under that form.
    - If every sub-folder is called train, val, valid, validation or test (in any case), and one of them train, they are
      splits, and their sub-folders are the classes, the same in each. train is the training split. The validation
      folder is held out; where there is none, test is. test beside a validation folder is left out.
    - A class folder without an image, in any split that is used, is an error, unless it is allowed: a class is never
      lost, and the number of another never moved, without a word.
"""

import fnmatch
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.data.image_files.image_format import CONVERT, IMAGE_EXTENSIONS
from pipeline.errors import ConfigError, DatasetMissingError
from pipeline.stores.local_store import LocalStore
from pipeline.stores.object_store import ObjectInfo, ObjectStore

TRAIN, HELD_OUT = "train", "held_out"
LEFTOVERS = frozenset(
    {"@eadir", "#recycle", "#snapshot", "@recycle", "$recycle.bin", "recycler", "system volume information", "__macosx",
     "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini"}
)  # fmt: skip
"""Names of files and folders that nobody put there, in small letters; hidden ones are left out by their dot."""
_SPLITS = {"train": TRAIN, "val": HELD_OUT, "valid": HELD_OUT, "validation": HELD_OUT, "test": None}
_NOT_READ = frozenset(
    {".heic", ".heif", ".svg", ".jp2", ".jxl", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
     ".eps", ".ico", ".exr", ".hdr", ".tga", ".ppm", ".pgm"}
)  # fmt: skip
_MOST_LINES, _MOST_NAMES = 20, 5
Folder = tuple[str, ...]
"""The names of a folder and of those it is in; () is the source itself."""


@dataclass(kw_only=True, slots=True)
class FolderImages:
    """The images of a split, in key order; lists of equal length."""

    keys: list[str] = field(default_factory=list)
    """Keys in the store."""
    labels: "array[int]" = field(default_factory=lambda: array("i"))
    """Class numbers, -1 without classes."""
    sizes_bytes: "array[int]" = field(default_factory=lambda: array("q"))
    """Sizes of the files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderListing:
    """What was found."""

    images: dict[str | None, FolderImages]
    """By split; all of them under None where folders are no splits."""
    class_names: tuple[str, ...]
    """In the order of their numbers; empty without classes."""
    num_ignored: int
    """Files that are no images by their names."""
    findings: tuple[tuple[str, str], ...]
    """What to say of it, as names and values: classes with their counts, and everything that is left out."""


@dataclass(kw_only=True, slots=True)
class _Found:
    """The files of a folder, sorted into what they are taken for."""

    keys: list[str] = field(default_factory=list)
    """Of the images."""
    sizes_bytes: "array[int]" = field(default_factory=lambda: array("q"))
    """Theirs."""
    num_images: Counter[Folder] = field(default_factory=Counter)
    """How many there are in each folder, of which two levels are told apart."""
    first: dict[Folder, str] = field(default_factory=dict)
    """The first image in each."""
    ignored: dict[Folder, Counter[str]] = field(default_factory=dict)
    """How many ignored files of each ending there are in each."""
    leftovers: Counter[str] = field(default_factory=Counter)
    """How many files in or under each name."""
    excluded: Counter[str] = field(default_factory=Counter)
    """How many files by each pattern."""
    unlisted: dict[str, str] = field(default_factory=dict)
    """Links and the like, and why they are left out."""

    def endings(self, folder: Sequence[str] = ()) -> Counter[str]:
        """How many ignored files of each ending there are in a folder, and below it."""
        within = (counts for name, counts in self.ignored.items() if name[: len(folder)] == tuple(folder))
        return sum(within, Counter())


def list_folder(store: ObjectStore, *, exclude: Sequence[str] = (), allow_empty_classes: bool = False) -> FolderListing:
    """Look at the names in a folder, by the rules above; no file is read.

    Args:
        store: The folder.
        exclude: Globs of what is left out.
        allow_empty_classes: A class folder without an image is a class all the same, instead of an error.

    Raises:
        DatasetMissingError: If there is no folder, or no image in it.
        ConfigError: If images lie beside sub-folders, a class has none, splits have different classes, or a name is not
            UTF-8.
        StorageAccessError: If the folder cannot be listed.
    """
    found = _sort_files(store, exclude)
    if not found.keys:
        raise DatasetMissingError(
            f"source: no images at {store.uri} ({_nothing(found)}); name a folder or s3://bucket/prefix"
        )
    splits, split_lines = _splits(found, store.uri)
    depth = 1 if splits else 0
    used = {name: num for name, num in found.num_images.items() if not splits or splits[name[0]] is not None}
    _refuse_mixture(found, used, depth, store.uri)
    folders = _class_folders(found, used, splits) if any(len(name) > depth for name in used) else {}
    if not allow_empty_classes:
        _refuse_empty(found, used, folders, store.uri)
    class_names = tuple(sorted({name for _, name in folders}))
    lines = [
        *split_lines, *_class_lines(class_names, used, depth), *_name_lines(folders), *_other_lines(found, exclude),
    ]  # fmt: skip
    return FolderListing(
        images=_labelled(found, splits, class_names),
        class_names=class_names,
        num_ignored=found.endings().total(),
        findings=tuple(lines),
    )


def _sort_files(store: ObjectStore, exclude: Sequence[str]) -> _Found:
    found = _Found()
    patterns = [(pattern, re.compile(fnmatch.translate(_nfc(pattern.rstrip("/"))))) for pattern in exclude]
    for info in _files(store, found.unlisted):
        parts = info.key.split("/")
        leftover = next((part for part in parts if part.startswith(".") or part.lower() in LEFTOVERS), None)
        pattern = next((text for text, glob in patterns if _matches(glob, "/" in text.rstrip("/"), parts)), None)
        folder = tuple(parts[:-1][:2])
        if leftover is not None:
            found.leftovers["hidden" if leftover.startswith(".") else leftover] += 1
        elif pattern is not None:
            found.excluded[pattern] += 1
        elif (ending := _ending(parts[-1])) in IMAGE_EXTENSIONS:
            found.keys.append(_check_name(info.key, store.uri))
            found.sizes_bytes.append(info.size_bytes)
            found.num_images[folder] += 1
            found.first.setdefault(folder, info.key)
        else:
            found.ignored.setdefault(folder, Counter())[ending] += 1
    return found


def _files(store: ObjectStore, unlisted: dict[str, str]) -> Iterator[ObjectInfo]:
    return store.list(unlisted=unlisted) if isinstance(store, LocalStore) else store.list()


def _matches(glob: re.Pattern[str], is_path: bool, parts: Sequence[str]) -> bool:
    names = ("/".join(parts[: end + 1]) for end in range(len(parts))) if is_path else iter(parts)
    return any(glob.match(_nfc(name)) for name in names)


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _ending(name: str) -> str:
    """What comes after the last dot, with it, in small letters; "" without a dot."""
    stem, dot, ending = name.rpartition(".")
    return f".{ending.lower()}" if stem and dot else ""


def _check_name(key: str, uri: str) -> str:
    if not key.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in key):
        raise ConfigError(f"source: {uri} has a file whose name is not UTF-8: {key!r}; rename it")
    return key


def _nothing(found: _Found) -> str:
    """What there is instead of images."""
    there = []
    if found.ignored:
        endings = found.endings()
        there.append(f"{endings.total()} files, none of them {' '.join(IMAGE_EXTENSIONS)}: {_counted(endings)}")
    if found.excluded:
        there.append(f"{found.excluded.total()} excluded")
    if found.unlisted:
        there.append(f"{len(found.unlisted)} links that lead nowhere, and the like")
    return "; ".join(there) or "nothing there"


def _splits(found: _Found, uri: str) -> tuple[dict[str, str | None], list[tuple[str, str]]]:
    """The split of each top-level folder, None for one that is left out, and what to say; {} if they are classes."""
    filled = {name[0] for name in found.num_images if name}
    folders = sorted(filled | {name[0] for name in found.ignored if name and name[0].lower() in _SPLITS})
    known = [folder for folder in folders if folder.lower() in _SPLITS]
    listed = ", ".join(f"{folder}/" for folder in known)
    others = [folder for folder in folders if folder not in known]
    if "train" not in {folder.lower() for folder in known}:
        if len(known) > 1 and not others:
            raise ConfigError(
                f"source: {uri} has {listed} and no train/; call the folder of the training images train, or name one "
                "of these as the source"
            )
        return {}, []
    if others and len(known) > 1:
        raise ConfigError(
            f"source: {uri} has {listed}, which are splits, beside {others[0]}/, which is none; leave it out by "
            f"--exclude {others[0]!r}, or move it"
        )
    if others or () in found.num_images:
        return {}, []
    if empty := sorted(set(folders) - filled):
        raise ConfigError(
            f"source: {uri}/{empty[0]}/ is a split and holds no image that is read "
            f"({_counted(found.endings(empty[:1]))}); {CONVERT}, or leave it out by --exclude {empty[0]!r}"
        )
    splits = {folder: _SPLITS[folder.lower()] for folder in folders}
    tests = [folder for folder in folders if splits[folder] is None]
    if HELD_OUT not in splits.values():
        splits |= dict.fromkeys(tests, HELD_OUT)
    lines = [(f"split {split}", f"{folder}/") for folder, split in splits.items() if split is not None]
    lines += [("left out", f"{folder}/, beside a validation folder") for folder, split in splits.items() if not split]
    return splits, lines


def _refuse_mixture(found: _Found, used: dict[Folder, int], depth: int, uri: str) -> None:
    direct = sorted(name for name in used if len(name) <= depth)
    within = sorted(name for name in used if len(name) > depth)
    if direct and within:
        raise ConfigError(
            f"source: {uri} has {sum(used[name] for name in direct)} images directly in it (first: "
            f"{found.first[direct[0]]}) beside sub-folders (first: {'/'.join(within[0][: depth + 1])}/); sub-folders "
            "are classes: move these images into one, or the sub-folders elsewhere"
        )


def _class_folders(
    found: _Found, used: dict[Folder, int], splits: dict[str, str | None]
) -> dict[tuple[str | None, str], set[Folder]]:
    """By split and class: the folders of that class, also those that hold no images."""
    depth = 1 if splits else 0
    folders: dict[tuple[str | None, str], set[Folder]] = {}
    for name in [*used, *found.ignored]:
        split = splits.get(name[0]) if splits and name else None
        if len(name) > depth and (split is not None or not splits):
            folders.setdefault((split, _nfc(name[depth])), set()).add(name[: depth + 1])
    return folders


def _refuse_empty(
    found: _Found, used: dict[Folder, int], folders: dict[tuple[str | None, str], set[Folder]], uri: str
) -> None:
    """Every class has an image in every split."""
    filled = {name[:length] for name in used for length in (1, 2)}
    empty = sorted(min(names) for names in folders.values() if not names & filled)
    if empty:
        folder = "/".join(empty[0])
        more = f", nor do {len(empty) - 1} folders more, such as {'/'.join(empty[1])}/" if len(empty) > 1 else ""
        raise ConfigError(
            f"source: {uri}/{folder}/ holds no image that is read ({_counted(found.endings(empty[0]))}){more}; "
            f"{CONVERT}, leave it out by --exclude {folder!r}, or keep a class without images by --allow-empty-classes"
        )
    by_split: dict[str | None, set[str]] = {}
    for split, name in folders:
        by_split.setdefault(split, set()).add(name)
    if len(by_split) > 1 and by_split[TRAIN] != by_split[HELD_OUT]:
        differing = by_split[TRAIN] ^ by_split[HELD_OUT]
        name = min(differing)
        there, missing = (TRAIN, HELD_OUT) if name in by_split[TRAIN] else (HELD_OUT, TRAIN)
        raise ConfigError(
            f"source: {uri} has the class {name!r} in the split {there!r} and not in {missing!r} ({len(differing)} "
            f"such classes); add images of it, leave it out by --exclude {name!r}, or keep it by --allow-empty-classes"
        )


def _labelled(
    found: _Found, splits: dict[str, str | None], class_names: Sequence[str]
) -> dict[str | None, FolderImages]:
    depth = 1 if splits else 0
    labels = {name: label for label, name in enumerate(class_names)}
    by_folder: dict[str, int] = {}  # as it is spelt there
    images: dict[str | None, FolderImages] = {}
    for key, size_bytes in zip(found.keys, found.sizes_bytes, strict=True):
        parts = key.split("/", depth + 1)
        split = splits[parts[0]] if splits else None
        if splits and split is None:
            continue
        folder = parts[depth]
        if folder not in by_folder:
            by_folder[folder] = labels[_nfc(folder)] if class_names else -1
        into = images.setdefault(split, FolderImages())
        into.keys.append(key)
        into.labels.append(by_folder[folder] if class_names else -1)
        into.sizes_bytes.append(size_bytes)
    return images


def _class_lines(class_names: Sequence[str], used: dict[Folder, int], depth: int) -> list[tuple[str, str]]:
    """How many images each class has, some twenty of them by name."""
    counts: Counter[str] = Counter()
    for name, num in used.items():
        counts[_nfc(name[depth]) if class_names else ""] += num
    lines = [("class", f"{name}: {counts[name]:,} images") for name in class_names[:_MOST_LINES]]
    more = class_names[_MOST_LINES:]
    if more:
        lines.append(("class", f"and {len(more):,} more, with {sum(counts[name] for name in more):,} images"))
    return lines


def _name_lines(folders: dict[tuple[str | None, str], set[Folder]]) -> list[tuple[str, str]]:
    """Folders that are one class by Unicode, and classes whose names differ by case alone."""
    lines = [
        ("one class", f"{name}: {len(names)} folders whose names differ in their Unicode form only")
        for (_, name), names in folders.items()
        if len(names) > 1
    ]
    by_case: dict[str, set[str]] = {}
    for _, name in folders:
        by_case.setdefault(name.casefold(), set()).add(name)
    lines += [
        ("attention", f"{', '.join(sorted(names))} are {len(names)} classes: their names differ by case only")
        for names in by_case.values()
        if len(names) > 1
    ]
    return lines


def _other_lines(found: _Found, exclude: Sequence[str]) -> list[tuple[str, str]]:
    """What is left out, and why."""
    lines, endings = [], found.endings()
    if endings:
        lines.append(("ignored", f"{endings.total():,} files by their names: {_counted(endings)}"))
    not_read = Counter({ending: num for ending, num in endings.items() if ending in _NOT_READ})
    if not_read:
        lines.append(("attention", f"{_counted(not_read)}: images of kinds that are not read; {CONVERT}"))
    if found.leftovers:
        lines.append(("passed over", f"{found.leftovers.total():,} files of systems: {_counted(found.leftovers)}"))
    lines += [("excluded", f"{found.excluded[pattern]:,} files by {pattern!r}") for pattern in exclude]
    for reason in sorted(set(found.unlisted.values())):
        keys = sorted(key for key, why in found.unlisted.items() if why == reason)
        lines.append(("left out", f"{len(keys):,}, each of which {reason}: {_some(keys)}"))
    return lines


def _counted(counts: Counter[str]) -> str:
    """The commonest first, each with its number."""
    return _some([f"{num:,} {name or 'without an ending'}" for name, num in counts.most_common()])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
