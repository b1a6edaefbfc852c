"""Mutants of volume files and pictures: NIfTI, NRRD, MetaImage, PNG, JPEG, TIFF and BMP."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .mutations import (
    BOMB_BYTES,
    TRICKY_NAMES,
    Rng,
    damaged,
    damaged_line,
    gzip_bomb,
    pick,
    zlib_bomb,
)
from .targets import SECRET, Target


def look_at(path: Path) -> None:
    """Everything that the product asks of an image file: what is it, its voxels, a slice of it."""
    from MedAnomalyCLIPLib.geometry import acquisition_axis, cut_slice
    from MedAnomalyCLIPLib.volume import list_contents, read_volume

    list_contents(path)
    volume = read_volume(path)
    axis = acquisition_axis(volume)
    cut_slice(volume, axis, 0)


class ImageFiles(Target):
    """Files of one or several formats, each damaged as bytes, or by what its format makes possible."""

    def __init__(
        self,
        name: str,
        seeds: Callable[[Path], list[Path]],
        special: tuple[Callable[[Path, Rng], Path], ...] = (),
        text_header: bool = False,
    ) -> None:
        self.name = name
        self._make, self._special, self._text_header = seeds, special, text_header
        self._seeds: list[dict[str, bytes]] = []

    def prepare(self, folder: Path) -> None:
        """Each seed is a file, and those that lie beside it and share its stem."""
        import MedAnomalyCLIPLib.pictures  # imported outside of the limits
        import MedAnomalyCLIPLib.volumefiles  # noqa: F401

        for number, make in enumerate([self._make]):
            place = folder / str(number)
            place.mkdir()
            for path in make(place):
                parts = [path, *sorted(p for p in place.iterdir() if p.stem == path.stem and p != path)]
                self._seeds.append({part.name: part.read_bytes() for part in parts})
                look_at(path)

    def mutant(self, folder: Path, rng: Rng) -> Path:
        if self._special and rng.random() < 0.12:
            return pick(rng, self._special)(folder, rng)
        files = dict(pick(rng, self._seeds))
        first = next(iter(files))
        hit = first if rng.random() < 0.8 else pick(rng, list(files))
        head, separator, rest = files[hit].partition(b"\n\n")
        if self._text_header and rng.random() < 0.6 and hit == first:
            if not separator:  # MetaImage's header ends with the line that names the data
                cut = files[hit].find(b"ElementDataFile")
                cut = files[hit].find(b"\n", cut)
                head, separator, rest = files[hit][:cut], files[hit][cut : cut + 1], files[hit][cut + 1 :]
            text = damaged_line(head.decode("latin-1"), rng)
            files[hit] = text.encode("latin-1", "replace") + separator + rest
        else:
            files[hit] = self.damaged(files[hit], rng)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return folder / first

    def damaged(self, content: bytes, rng: Rng) -> bytes:
        """Compressed files are damaged inside as often as outside."""
        if content[:2] == b"\x1f\x8b" and rng.random() < 0.6:
            return gzip.compress(damaged(gzip.decompress(content), rng), compresslevel=1)
        return damaged(content, rng)

    def look(self, path: Path, output: Path) -> None:
        look_at(path)


def _voxels(dtype: type = np.int16) -> np.ndarray:
    values = np.arange(3 * 9 * 8).reshape(3, 9, 8) * 7 % 200
    return values.astype(dtype)


def _write(path: Path, voxels: np.ndarray, compressed: bool = False) -> Path:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing([0.5, 0.75, 2.0])
    image.SetMetaData("ITK_FileNotes", SECRET)
    sitk.WriteImage(image, str(path), compressed)
    return path


def nifti_seeds(folder: Path) -> list[Path]:
    return [
        _write(folder / "a.nii", _voxels()),
        _write(folder / "b.nii.gz", _voxels(np.float32)),
        _write(folder / "c.nii", _voxels(np.uint8)[:1]),
        _write(folder / "d.hdr", _voxels(np.uint16)),  # with d.img
    ]


def nifti_header(folder: Path, rng: Rng) -> Path:
    """Sizes, spacings, offsets and matrices of any value in a header that is otherwise in order."""
    source = _write(folder / "a.nii", _voxels(pick(rng, (np.int16, np.float32))))
    content = bytearray(source.read_bytes())
    for _ in range(int(rng.integers(1, 4))):
        kind = int(rng.integers(4))
        if kind == 0:
            sizes = pick(rng, (32767, -1, -32768, 0, 1, 30000))
            struct.pack_into("<h", content, 40 + 2 * int(rng.integers(8)), sizes)
        elif kind == 1:
            number = float(pick(rng, (np.nan, np.inf, -np.inf, -1.0, 0.0, 1e38, 1e-44, 3e9)))
            struct.pack_into("<f", content, 76 + 4 * int(rng.integers(8)), number)
        elif kind == 2:
            number = float(pick(rng, (np.nan, np.inf, -1.0, 0.0, 1e30, 2**31, 2**62, 351, 353, 1e6)))
            struct.pack_into("<f", content, 108 + 4 * int(rng.integers(3)), number)
        else:
            number = float(pick(rng, (np.nan, np.inf, 0.0, 1e38, -1e38, 7.0)))
            struct.pack_into("<f", content, 256 + 4 * int(rng.integers(18)), number)
    if rng.random() < 0.4:
        source.unlink()
        source = folder / "a.nii.gz"
        content = bytearray(gzip.compress(bytes(content)))
    source.write_bytes(content)
    return source


_bombs: dict[str, bytes] = {}  # made once: squeezing a quarter of a gigabyte takes a second


def _bomb(kind: str, make: Callable[[], bytes]) -> bytes:
    return _bombs.setdefault(kind, b"") or _bombs.setdefault(f"{kind}!", make())


def nifti_bomb(folder: Path, rng: Rng) -> Path:
    """A small image in a stream without end, its voxels at the beginning or far behind."""
    head = bytearray(_write(folder / "seed.nii", _voxels()).read_bytes())
    (folder / "seed.nii").unlink()
    far = rng.random() < 0.7
    struct.pack_into("<f", head, 108, BOMB_BYTES / 2 if far else 352.0)
    path = folder / "bomb.nii.gz"
    path.write_bytes(_bomb(f"nifti{far}", lambda: gzip_bomb(bytes(head))))
    return path


def nrrd_seeds(folder: Path) -> list[Path]:
    attached = _write(folder / "a.nrrd", _voxels())
    packed = _write(folder / "b.nrrd", _voxels(np.float32), compressed=True)
    detached = _write(folder / "c.nhdr", _voxels(np.uint8))  # with c.raw
    colour = _rgb(folder / "e.nrrd")
    return [attached, packed, detached, colour]


def _rgb(path: Path) -> Path:
    import SimpleITK as sitk

    values = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    sitk.WriteImage(sitk.GetImageFromArray(values, isVector=True), str(path))
    return path


def nrrd_elsewhere(folder: Path, rng: Rng) -> Path:
    """A detached header whose data lie where it should not be looked."""
    path = _write(folder / "c.nhdr", _voxels(np.uint8))
    text = path.read_text(encoding="latin-1")
    target = _elsewhere(folder, rng)
    choices = (
        target,
        f"LIST\n{target}",
        f"{target}%03d.raw 1 3 1",
        f"LIST 2\n{target}\n{target}",
        "c.raw " * 2,
    )
    path.write_text(_replaced(text, "data file:", f" {pick(rng, choices)}"), encoding="latin-1")
    return path


def metaimage_elsewhere(folder: Path, rng: Rng) -> Path:
    path = _write(folder / "c.mhd", _voxels(np.uint8))
    text = path.read_text(encoding="latin-1")
    target = _elsewhere(folder, rng)
    choices = (target, f"LIST\n{target}", f"{target}%03d.raw 1 3 1", f"LIST 2D\n{target}", f" {target} ")
    path.write_text(_replaced(text, "ElementDataFile =", f" {pick(rng, choices)}"), encoding="latin-1")
    return path


def _elsewhere(folder: Path, rng: Rng) -> str:
    """A name for a data file: a trick, a pipe, a link out of the folder, or the header itself."""
    kind = int(rng.integers(4))
    if kind == 0:
        os.mkfifo(folder / "pipe")
        return "pipe"
    if kind == 1:
        (folder / "link").symlink_to(str(pick(rng, ("/etc/passwd", "/dev/zero", "/dev/full", "..", "link"))))
        return "link"
    if kind == 2:
        return str(pick(rng, ("c.nhdr", "c.mhd", ".", "c.raw")))
    return str(pick(rng, TRICKY_NAMES)).encode("latin-1", "replace").decode("latin-1")


def _replaced(text: str, key: str, value: str) -> str:
    lines = [f"{key}{value}" if line.startswith(key) else line for line in text.split("\n")]
    return "\n".join(lines)


def nrrd_bomb(folder: Path, rng: Rng) -> Path:
    """Packed data that go on for longer than the sizes say, or sizes far beyond what is packed."""
    sizes = pick(rng, ("8 9 3", "400 400 400", "30000 30000 1", "60000 60000 60000", "2 2147483647 1"))
    header = (
        "NRRD0004\ntype: uchar\ndimension: 3\nspace: left-posterior-superior\n"
        f"sizes: {sizes}\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n"
        "kinds: domain domain domain\nencoding: gzip\n\n"
    )
    path = folder / "bomb.nrrd"
    packed = _bomb("gzip", lambda: gzip_bomb(b"")) if rng.random() < 0.5 else gzip.compress(bytes(500))
    path.write_bytes(header.encode() + packed)
    return path


def metaimage_seeds(folder: Path) -> list[Path]:
    return [
        _write(folder / "a.mha", _voxels()),
        _write(folder / "b.mha", _voxels(np.float32), compressed=True),
        _write(folder / "c.mhd", _voxels(np.uint8)),  # with c.raw
        _write(folder / "d.mhd", _voxels(np.uint8), compressed=True),  # with d.zraw
    ]


def metaimage_bomb(folder: Path, rng: Rng) -> Path:
    sizes = pick(rng, ("8 9 3", "400 400 400", "30000 30000 1", "60000 60000 60000", "-1 9 3", "0 0 0"))
    packed = _bomb("zlib", zlib_bomb) if rng.random() < 0.6 else zlib.compress(bytes(500))
    stated = pick(rng, (len(packed), 0, -1, 2**31, 2**62, 10))
    header = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        f"CompressedData = True\nCompressedDataSize = {stated}\nDimSize = {sizes}\n"
        "ElementSpacing = 1 1 1\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    )
    path = folder / "bomb.mha"
    path.write_bytes(header.encode() + packed)
    return path


def picture_seeds(folder: Path) -> list[Path]:
    from PIL import Image, PngImagePlugin

    grey, deep = _voxels(np.uint8)[0], _voxels(np.uint16)[0] * 256
    colour = np.stack([grey, grey.T[:9, :8] if grey.T.shape == grey.shape else grey, 255 - grey], -1)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", SECRET, zip=True)
    pages = [Image.fromarray(page) for page in _voxels(np.uint8)]
    saved = {
        "a.png": lambda p: Image.fromarray(grey).save(p, pnginfo=text),
        "b.png": lambda p: Image.fromarray(deep).save(p),
        "c.png": lambda p: Image.fromarray(colour).convert("P").save(p, transparency=3),
        "d.jpg": lambda p: Image.fromarray(colour).save(p, comment=SECRET),
        "e.jpg": lambda p: Image.fromarray(grey).save(p, progressive=True, exif=_exif()),
        "f.tif": lambda p: pages[0].save(p, save_all=True, append_images=pages[1:], compression="tiff_lzw"),
        "g.tif": lambda p: Image.fromarray(deep).save(p, compression="tiff_adobe_deflate"),
        "h.tif": lambda p: Image.fromarray(_voxels(np.float32)[0]).save(p),
        "i.bmp": lambda p: Image.fromarray(colour).save(p),
        "j.tif": lambda p: _doubles(p),
    }
    for name, save in saved.items():
        save(folder / name)
    return [folder / name for name in saved]


def _exif() -> bytes:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def _doubles(path: Path) -> None:
    import tifffile

    tifffile.imwrite(path, _voxels(np.float64)[0])


def png_bomb(folder: Path, rng: Rng) -> Path:
    """A PNG of any claimed size and depth over a stream that unpacks for long."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width, height = (int(pick(rng, (1, 8, 4000, 9000, 60000, 2**31 - 1, 2**32 - 1, 0))) for _ in "ab")
    depth, colour = int(pick(rng, (1, 8, 16, 3))), int(pick(rng, (0, 2, 3, 4, 6, 1)))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(rng.integers(2)))
    packed = _bomb("zlib", zlib_bomb)
    extra = pick(rng, (b"", chunk(b"zTXt", b"k\0\0" + packed), chunk(b"iCCP", b"k\0\0" + packed)))
    data = packed if rng.random() < 0.5 else zlib.compress(bytes(1000))
    path = folder / "bomb.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
    return path


def tiff_directory(folder: Path, rng: Rng) -> Path:
    """A TIFF written by hand: tags of any type, count and value, directories that may go round."""
    entries = {256: 8, 257: 9, 258: 8, 259: 1, 262: 1, 273: 500, 277: 1, 278: 9, 279: 72, 339: 1}
    tags = []
    for tag, value in entries.items():
        kind, count = 4, 1
        if rng.random() < 0.25:
            value = int(pick(rng, (0, 1, 2, 3, 7, 16, 32, 64, 65535, 2**31, 2**32 - 1, 60000)))
        if rng.random() < 0.1:
            kind = int(rng.integers(0, 20))
        if rng.random() < 0.1:
            count = int(pick(rng, (0, 2, 1000, 2**31, 2**32 - 1)))
        if rng.random() > 0.05:
            tags.append(struct.pack("<HHII", tag, kind, count, value))
    following = int(pick(rng, (0, 8, 8, 300, 2**32 - 1)))
    directory = struct.pack("<H", len(tags)) + b"".join(tags) + struct.pack("<I", following)
    path = folder / "odd.tif"
    path.write_bytes((b"II*\0" + struct.pack("<I", 8) + directory).ljust(500, b"\0") + bytes(range(72)))
    return path


TARGETS = (
    ImageFiles("nifti", nifti_seeds, (nifti_header, nifti_header, nifti_header, nifti_bomb)),
    ImageFiles("nrrd", nrrd_seeds, (nrrd_elsewhere, nrrd_bomb), text_header=True),
    ImageFiles("metaimage", metaimage_seeds, (metaimage_elsewhere, metaimage_bomb), text_header=True),
    ImageFiles("pictures", picture_seeds, (png_bomb, tiff_directory, tiff_directory)),
)
