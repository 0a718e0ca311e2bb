"""`mige-rt sign` and `mige-rt verify`: who made a bundle."""

from pathlib import Path

import click

from mige_rt.cli.shared import PATH
from mige_rt.errors import requires


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--key", type=PATH, required=True, help="a private key of Ed25519 in PEM, as openssl makes it")
def sign(bundle: Path, key: Path) -> None:
    """Sign a bundle, so that others can find out that it is yours.

    \b
      openssl genpkey -algorithm ed25519 -out key.pem
      openssl pkey -in key.pem -pubout -out key.pub
      mige-rt sign bundle --key key.pem
      mige-rt verify bundle --key key.pub

    The signature covers the manifest, and by their hashes the graphs, the weights and the tokenizer; not report.json,
    and not the plans, which are built for each kind of machine.
    """
    with requires("sign", "signing"):
        from mige_rt.signing import sign_bundle
    click.echo(sign_bundle(bundle, key))


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--key", type=PATH, required=True, help="the author's public key in PEM")
def verify(bundle: Path, key: Path) -> None:
    """Check that what a bundle runs is as its author signed it; hashes every such file."""
    with requires("sign", "verifying"):
        from mige_rt.signing import verify_bundle
    verify_bundle(bundle, key)
    click.echo(f"{bundle} is as the owner of {key} signed it")
