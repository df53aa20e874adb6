"""The commands that repeat or sign what an export wrote: `intact rebuild` and `intact sign`.

Must not know: how anything is exported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from exporter.console import check_folder_of, print_json, print_table, reported_errors
from exporter.flags import Debug, Json, Quiet, option

__all__ = ["rebuild", "sign"]

UNEXPLAINED = (
    "Settings, data and packages are those of the export: compare the processor and the code of the model, and load "
    "or seed weights that it draws at random."
)
"""Printed where files differ and nothing that a bundle records explains it."""


def rebuild(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle that `intact export` wrote.")],
    check: Annotated[bool, option("Exit with 1 unless the files are the same, byte for byte.", "--check")] = False,
    out: Annotated[Path | None, option("Keep the new bundle here.", "--out", metavar="DIR")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Repeat an export from its own record, and compare the files: model, reference program, golden set.

    Model, checkpoint and data have to be where they were, relative to the current folder.

    Example: [bold]intact rebuild build/net --check[/bold]
    """
    with reported_errors(debug=debug):
        from exporter.progress import console_progress
        from exporter.rebuild import rebuild as repeat

        found = repeat(folder, out, console_progress(quiet=quiet))
        if as_json:
            print_json(found)
        else:
            same = len(found.compared) - len(found.differing)
            Console().print(f"{same} of {len(found.compared)} files are the same.", highlight=False)
            print_table(("differs",), [(name,) for name in found.differing], box=None)
            for what, pairs in (("sha256 of the data", found.data), ("package", found.changed)):
                changes = [(name, *(each or "absent" for each in pair)) for name, pair in pairs.items()]
                print_table((what, "at the export", "now"), changes, box=None)
            if found.differing and not found.data and not found.changed:
                Console().print(UNEXPLAINED, highlight=False)
        raise typer.Exit(check and bool(found.differing))


def sign(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle that `intact export` wrote.")],
    key: Annotated[Path, option("Private elliptic-curve key, PEM.", "--key", metavar="FILE")],
    out: Annotated[
        Path | None, option("The signature.  [default: DIR.sig, beside the bundle]", "--out", metavar="FILE")
    ] = None,
    debug: Debug = False,
) -> None:
    """Sign a bundle in the format of OpenSSF's model-signing.

    Example: [bold]openssl ecparam -name prime256v1 -genkey -noout -out key.pem[/bold], then
    [bold]intact sign build/net --key key.pem[/bold] and
    [bold]intact verify build/net --signature build/net.sig --public-key pub.pem[/bold]
    """
    with reported_errors(debug=debug):
        from exporter.handover.signature import sign as write

        path = out or folder.with_name(f"{folder.resolve().name}.sig")
        check_folder_of(path)
        write(folder, key, path)
        Console().print(f"Wrote {path}.", markup=False, highlight=False, soft_wrap=True)
