"""The study's images, from Debian's packages: drawings, and crops of photographs.

    python -m benchmarks.study.data drawings --out=runs/study/drawings
    python -m benchmarks.study.data textures --out=runs/study/textures
    python -m benchmarks.study.data photographs --out=runs/study/photographs

Leaves OUT/train and OUT/test, a sub-folder of PNGs for each class, contact.png and the
packages' licences. Packages come from `apt-get download`, or lie in --packages as .deb
files, which dpkg-deb unpacks, or as folders. The same packages give the same files.
photographs: the 21 MB of the packages that textures needs, as folders, to carry along.

drawings: figures of openclipart and tuxpaint that have colour, cut out, on white; every
eighth is held out. textures: square crops of the photographs below, at several scales;
a photograph is a class, of 4 x 2 fields, in one of which the held-out crops lie.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from sra2_jax.command import Parser, run_program
from sra2_jax.errors import UserError, explained
from sra2_jax.generator import grid

CLIPS = "openclipart-png", "usr/share/openclipart/png"
STAMPS = "tuxpaint-stamps-default", "usr/share/tuxpaint/stamps"
# class -> folders of either package
DRAWINGS = {
    "animals": [(*CLIPS, "animals"), (*STAMPS, "animals")],
    "buildings": [
        *((*CLIPS, f"buildings/{part}") for part in ("", "homes")),
        *((*STAMPS, f"town/{part}") for part in ("houses", "monuments", "cartoon")),
    ],
    "food": [(*CLIPS, "food"), (*STAMPS, "food")],
    "people": [(*CLIPS, "people"), (*STAMPS, "people")],
    "plants": [(*CLIPS, "plants"), (*STAMPS, "plants")],
    "tools": [(*CLIPS, "tools"), (*STAMPS, "household")],
    "transport": [
        *((*CLIPS, f"transportation/{part}") for part in ("", "boating", "vehicles")),
        (*STAMPS, "vehicles"),
    ],
}
PLASMA = "plasma-workspace-wallpapers", "usr/share/wallpapers"
MATE = "mate-backgrounds", "usr/share/backgrounds/mate/nature"
GNOME = "gnome-backgrounds", "usr/share/backgrounds/gnome"
PHOTOGRAPHS = [
    *(
        (*PLASMA, f"{name}/contents/images")
        for name in (
            *("BytheWater", "ColdRipple", "ColorfulCups", "EveningGlow", "FallenLeaf"),
            *("Grey", "OneStandsOut", "Path", "Shell", "summer_1am", "Volna"),
        )
    ),
    *(
        (*MATE, f"{name}.jpg")
        for name in (
            *("Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird"),
            *("RainDrops", "TwoWings", "Wood", "YellowFlower"),
        )
    ),
    *((*GNOME, f"{name}.webp") for name in ("licorice-l", "wood-l")),
]
LARGEST = 2**23  # pixels; a few are a hundred million
COLOUR = 0.12  # mean saturation of what is not white, at least
SCALES = 1.0, 4.0  # pixels of the photograph to one of a crop of 128
FLAT = 4.0  # of 255; crops of a smaller deviation are left out


def unpacked(package: str, packages: Path | None, cache: Path) -> Path:
    """The folder of a package's files. Raises UserError: there is none."""
    for folder in (cache / package, (packages or cache) / package):
        if folder.exists():
            return folder
    with explained(f"{package}: not to be had", "apt-get update, or see --packages"):
        if packages is None:
            command = ["apt-get", "download", "-q", package]
            subprocess.run(command, cwd=cache, check=True, capture_output=True)
        (deb,) = (packages or cache).glob(f"{package}_*.deb")
        part = cache / f"{package}.part"
        subprocess.run(["dpkg-deb", "-x", deb, part], check=True, capture_output=True)
        return part.rename(cache / package)


def figure(path: Path, side: int) -> Image.Image | None:
    """A drawing cut out, in the middle of a white square; None: without colour,
    tiny or huge."""
    with Image.open(path) as image:
        if image.width * image.height > LARGEST:
            return None
        white = Image.new("RGBA", image.size, "white")
        drawn = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    ink = np.any(np.asarray(drawn) < 250, axis=-1)
    if not np.any(ink):
        return None
    columns, rows = (np.flatnonzero(np.any(ink, axis=k)) for k in (0, 1))
    box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    saturation = np.asarray(drawn.convert("HSV"))[..., 1][ink].mean() / 255
    if saturation < COLOUR or min(box[2] - box[0], box[3] - box[1]) < side // 4:
        return None
    drawn = drawn.crop(box)
    drawn.thumbnail((side - 4, side - 4), Image.Resampling.BOX)
    square = Image.new("RGB", (side, side), "white")
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return square


def drawings(folder_of: dict[str, Path], side: int) -> Iterator[tuple]:
    """(class, whether held out, image) of all drawings."""
    for name, sources in DRAWINGS.items():
        files: set[Path] = set()
        for package, root, part in sources:
            folder = folder_of[package] / root / part
            flat = part.endswith("/")  # not what lies deeper
            files.update(folder.glob("*.png") if flat else folder.rglob("*.png"))
        seen: set[bytes] = set()
        for path in sorted(files, key=lambda p: (p.name, str(p))):
            image = None if path.is_symlink() else figure(path, side)
            if image is None:
                continue
            # There are copies: none may be held out from itself.
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX)) // 32
            if small.tobytes() not in seen:
                yield name, len(seen) % 8 == 7, image
                seen.add(small.tobytes())


def photographs(folder_of: dict[str, Path]) -> Iterator[tuple[str, Path]]:
    """(class, file), of several sizes the largest."""
    for package, root, part in PHOTOGRAPHS:
        path = folder_of[package] / root / part
        if path.is_dir():
            kept = [p for p in path.iterdir() if not p.is_symlink()]
            yield path.parents[1].name, max(kept, key=lambda p: p.stat().st_size)
        else:
            yield path.stem, path


def textures(folder_of: dict[str, Path], side: int, crops: int) -> Iterator[tuple]:
    """(class, whether held out, image) of crops of all photographs, as many of each."""
    for number, (name, path) in enumerate(photographs(folder_of)):
        with Image.open(path) as file:
            photograph = file.convert("RGB")
        draw = np.random.default_rng(number)
        width, height = photograph.width // 4, photograph.height // 2
        held_out = int(draw.integers(8))
        fields = [f for f in range(8) if f != held_out]
        for i in range(crops):
            field = held_out if i % 8 == 7 else int(draw.choice(fields))
            for _ in range(20):  # a crop that is not flat
                size = 128 * np.exp(draw.uniform(*np.log(SCALES)))
                size = int(min(size, width, height))
                x = (field % 4) * width + int(draw.integers(width - size + 1))
                y = (field // 4) * height + int(draw.integers(height - size + 1))
                box = x, y, x + size, y + size
                kind = (
                    Image.Resampling.BOX if size >= side else Image.Resampling.BICUBIC
                )
                crop = photograph.resize((side, side), kind, box)
                if np.asarray(crop).std((0, 1)).mean() >= FLAT:
                    break
            yield name, i % 8 == 7, crop


def carried(folder_of: dict[str, Path], out: Path) -> str:
    """Copies the photographs and licences, laid out as in the packages."""
    files = [path for _, path in photographs(folder_of)]
    files += [licence(folder, package) for package, folder in folder_of.items()]
    for package, folder in folder_of.items():
        for path in files:
            if path.is_relative_to(folder):
                target = out / package / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    return f"{len(files)} files"


def licence(folder: Path, package: str) -> Path:
    return folder / "usr/share/doc" / package / "copyright"


def images(found: Iterator[tuple], out: Path) -> str:
    """Writes (class, whether held out, image)."""
    shown: dict[str, list[np.ndarray]] = {}
    counts = {"train": 0, "test": 0}
    for name, held_out, image in tqdm(found, mininterval=5, unit="image"):
        split = "test" if held_out else "train"
        folder = out / split / name
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{counts[split]:06d}.png")
        counts[split] += 1
        if len(shown.setdefault(name, [])) < 16:
            shown[name].append(np.asarray(image))
    rows = np.stack([x for some in shown.values() for x in some])
    Image.fromarray(grid(rows, 16)).save(out / "contact.png")
    return f"{counts['train']} images, {counts['test']} held out, {len(shown)} classes"


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("kind", choices=("drawings", "textures", "photographs"))
    add("--out", type=Path, required=True, metavar="FOLDER", help="new folder")
    add("--resolution", type=int, default=64, help="pixels a side (%(default)s)")
    add("--crops", type=int, default=1000, help="of a photograph (%(default)s)")
    add("--packages", type=Path, metavar="FOLDER", help="of packages there already")
    a = parser.parse_args()
    if a.out.exists():
        raise UserError(f"{a.out}: exists already: remove it or use another --out")
    sources = [s for part in DRAWINGS.values() for s in part]
    sources = sources if a.kind == "drawings" else PHOTOGRAPHS
    packages = sorted({package for package, *_ in sources})
    part = a.out.with_name(f".{a.out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with tempfile.TemporaryDirectory() as cache:
        folder_of = {p: unpacked(p, a.packages, Path(cache)) for p in packages}
        if a.kind == "photographs":
            said = carried(folder_of, part)
        else:
            (part / "licences").mkdir(parents=True)
            for package, folder in folder_of.items():
                target = part / "licences" / f"{package}.txt"
                shutil.copy(licence(folder, package), target)
            if a.kind == "drawings":
                found = drawings(folder_of, a.resolution)
            else:
                found = textures(folder_of, a.resolution, a.crops)
            said = images(found, part)
    part.rename(a.out)
    print(f"{a.out}: {said}")


if __name__ == "__main__":
    run_program(main)
