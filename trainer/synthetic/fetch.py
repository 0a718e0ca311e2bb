"""Fetch the emoji images from the npm registry: `python -m trainer.synthetic.fetch --out DIR`.

With --photos, copies of photos from packages that are installed go to DIR/photos, for backgrounds; DIR may be there.
"""

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import click

from mige_rt.atomic import atomic_folder
from mige_rt.errors import InputError, reason
from trainer.synthetic.photos import fetch_photos

FLUENT = "@lobehub/fluent-emoji-3d@1.1.0"  # MIT; 256x256 WebP with alpha
NOTO = "emoji-datasource-google@16.0.0"  # data MIT, images Apache-2.0; 64x64 PNG with alpha


def unpack_package(package: str, out: Path, wanted: dict[str, str]) -> None:
    """Extract the members of an npm package whose path starts with a key of `wanted` into that key's folder of out.

    Raises FileNotFoundError if there is no npm, subprocess.CalledProcessError if it fails, with its words in `stderr`.
    """
    if shutil.which("npm") is None:
        raise FileNotFoundError("the npm client was not found; install Node.js, which brings it")
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", "--loglevel=error", package]  # --silent would keep the reason of a failure, too
        packed = subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True)
        with tarfile.open(Path(scratch) / packed.stdout.split()[-1]) as archive:
            for member in archive:
                prefix = next((p for p in wanted if member.name.startswith(p)), None)
                content = archive.extractfile(member) if prefix is not None else None
                if prefix is None or content is None:
                    continue
                target = out / wanted[prefix] / Path(member.name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())


def fetch(out: Path) -> None:
    """Fill `out` with fluent/*.webp, noto/*.png, emoji.json and the licences. Needs the `npm` client.

    Raises InputError if out exists or cannot be written, FileNotFoundError if there is no npm or the packages lack
    what is expected, subprocess.CalledProcessError if npm fails.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({reason(error)}): give a path in a folder of your own") from error
    with atomic_folder(out) as partial:
        unpack_package(FLUENT, partial, {"package/assets/": "fluent", "package/README": "licences/fluent"})
        unpack_package(
            NOTO,
            partial,
            {"package/img/google/64/": "noto", "package/emoji.json": "", "package/LICENSE": "licences/noto"},
        )
        for name, pattern in (("fluent", "*.webp"), ("noto", "*.png"), (".", "emoji.json")):
            if not any((partial / name).glob(pattern)):
                raise FileNotFoundError(f"the packages hold no {pattern} where it is expected; nothing was written")


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="folder to make")
@click.option(
    "--photos", is_flag=True, help="photos that are installed, too; into a folder made before, if there is one"
)
def main(out: Path, photos: bool) -> None:
    """Fetch; bad input ends with exit code 2."""
    try:
        if not (photos and out.is_dir()):
            fetch(out)
        if photos:
            fetch_photos(out)
    except (InputError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from error
    except subprocess.CalledProcessError as error:
        raise click.ClickException(f"npm could not fetch {error.cmd[-1]}: {error.stderr.strip()}") from error
    click.echo(out)


if __name__ == "__main__":
    main()
