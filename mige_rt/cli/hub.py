"""`mige-rt push` and `mige-rt pull`: bundles on the Hugging Face hub."""

import re
from pathlib import Path
from typing import Any

import click

from mige_rt.cli.shared import PATH
from mige_rt.errors import InputError
from mige_rt.terminal import echo, report


@click.command()
@click.argument("bundle", type=PATH)
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--license", help="of the weights, by the hub's identifier, as apache-2.0; stands in the model card")
@click.option("--private", is_flag=True, help="make a new repository private")
@click.option("--message", default="", help="of the commit  [default: the model's name and precision]")
def push(bundle: Path, repository: str, license: str | None, **options: Any) -> None:
    """Upload a bundle to the Hugging Face hub, with a model card made from its manifest.

    \b
      hf auth login
      mige-rt push bundle me/mige --license apache-2.0
      mige-rt run --model me/mige --prompt "make the background blue" --source docs/scene.png

    All files go in one commit, after they were compared with the manifest. Plans are built for each kind of machine,
    and stay here.
    """
    from mige_rt.bundle import read_manifest
    from mige_rt.hub import push_bundle
    from mige_rt.model_card import model_card

    if license is not None and not re.fullmatch(r"[a-z0-9.-]{1,50}", license, re.ASCII):
        raise InputError(f"--license is {license!r}; an identifier of the hub is expected, such as apache-2.0 or other")
    card = model_card(bundle, read_manifest(bundle), repository, license=license)
    echo(push_bundle(bundle, repository, card, **options))


@click.command()
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--out", type=PATH, required=True, help="the bundle to make")
@click.option("--revision", help="a branch, a tag or a commit  [default: main]")
def pull(repository: str, out: Path, revision: str | None) -> None:
    """Download a bundle from the Hugging Face hub; every file is compared with the manifest's hashes.

    \b
      mige-rt pull me/mige --out bundle
      mige-rt run --model bundle --prompt "make the background blue" --source docs/scene.png

    The folder is made whole or not at all.
    """
    from mige_rt.hub import pull_bundle

    report(f"commit {pull_bundle(repository, out, revision=revision)}")
    echo(out)
