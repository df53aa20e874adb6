"""Sign a bundle, and check its signature, in the format of OpenSSF's model-signing.

The signature lies beside the bundle and covers every file in it. The tools of model-signing read it too.

Must not know: what the files are.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from calibrators.errors import InputError, first_line, no_file
from exporter.handover.bundle import check_plain, verify_manifest

__all__ = ["check_signature", "sign"]

EXTRA = "intact-export[signing]"


def sign(bundle: Path, key: Path, signature: Path) -> None:
    """Write the signature of a bundle with a private key (PEM; curves P-256, P-384 and P-521).

    raises: InputError for a folder that is no intact bundle, a signature inside it, or a key that cannot be used.
    """
    library = _library()
    verify_manifest(bundle)
    if signature.resolve().is_relative_to(bundle.resolve()):
        raise InputError(f"{signature} is inside the bundle, which it would change; put the signature beside it.")
    if not key.is_file():
        raise InputError(f"key {no_file(key)}")
    try:
        library.signing.Config().use_elliptic_key_signer(private_key=key).sign(bundle, signature)
    except Exception as error:  # the library raises exceptions of many packages
        reason = first_line(error).rstrip(".")
        raise InputError(f"cannot sign with {key}: {reason}; give a private elliptic-curve key in PEM.") from error


def check_signature(bundle: Path, key: Path, signature: Path) -> None:
    """Check that a signature is that of a bundle as it is, made with the private key of this public one.

    raises: InputError if it is not, or if a file cannot be read.
    """
    library = _library()
    for kind, path in (("public key", key), ("signature", signature)):
        if not path.is_file():
            raise InputError(f"{kind} {no_file(path)}")
    check_plain(bundle)  # the library would wait for a pipe
    try:
        library.verifying.Config().use_elliptic_key_verifier(public_key=key).verify(bundle, signature)
    except Exception as error:  # the library raises exceptions of many packages
        if "public key?" in str(error):
            raise InputError(f"{key} is not a public key in PEM; give the signer's public key.") from error
        raise InputError(
            f"{signature} is not a valid signature of {bundle} by {key}. Do not use this bundle."
        ) from error


def _library() -> Any:
    """Return model-signing, which takes a second to import.

    raises: InputError if it is not installed.
    """
    try:
        import model_signing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise InputError(f"signatures need the extra `signing`: pip install '{EXTRA}'.") from error
    module: ModuleType = model_signing
    return module
