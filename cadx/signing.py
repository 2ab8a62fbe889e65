"""Signatures with a key of one's own: of a bundle or an archive, and of what a reviewer puts a name to.

The form is that of OpenSSF's model signing (an in-toto statement with the digest of each file, in a Sigstore
bundle), so that `model_signing verify key` of any other machine checks it too. Nothing is asked of a network.
A pair of keys is made by

    openssl ecparam -name prime256v1 -genkey -noout -out key.pem
    openssl ec -in key.pem -pubout -out key.pub
"""

import json
import re
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from pydantic import Field, ValidationError

from cadx.files import replacing, write_json
from cadx.types import Config, Digest

SUFFIX = ".sig"
_MISMATCH = re.compile(r"Hash mismatch for \\?'([^'\\]+)|files (?:found )?in model \\?'[^']*': ([^'\"\]]+)")
REVIEW, REVIEW_SIGNATURE = "review.json", "review.json.sig"


def signature_of(signed: Path) -> Path:
    """Where the signature of a file or folder stands: beside it, since a bundle holds only what it names."""
    return signed.with_name(signed.name + SUFFIX)


def sign(target: Path, key: Path, signature: Path) -> None:
    """Write the signature of a file, or of every file in a folder.

    Args:
        target: what is signed.
        key: a private key, PEM, on one of the curves P-256, P-384 and P-521.
        signature: the file to write, whole or not at all.

    Raises:
        ValueError: if nothing is there, or the key is none.
    """
    from model_signing import signing

    if not target.exists():
        raise ValueError(f"{target}: no such file or folder; give a bundle, an archive or a metrics.json")
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key)  # type: ignore[no-untyped-call]
    except FileNotFoundError:
        raise ValueError(
            f"{key}: no such key; `openssl ecparam -name prime256v1 -genkey` makes one"
        ) from None
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            f"{key}: no private key without a password, of a curve P-256, P-384 or P-521, as PEM"
        ) from None
    with replacing(signature) as partial:
        config.sign(target, partial)


def check_signature(target: Path, signature: Path, public_key: Path) -> str:
    """What is wrong with a signature, in words; empty where it holds.

    Raises:
        ValueError: if the public key is none.
    """
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)  # type: ignore[no-untyped-call]
    except FileNotFoundError:
        raise ValueError(f"{public_key}: no such key; name the signer's public key") from None
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{public_key}: no public key of a curve P-256, P-384 or P-521, as PEM") from None
    try:
        with redirect_stdout(StringIO()):
            config.verify(target, signature)
    except InvalidSignature:
        return "the signature is not that of its contents"
    except FileNotFoundError as error:
        return f"{Path(error.filename or signature).name} is missing"
    except Exception as error:  # of a damaged file the library's parsers raise nearly anything
        if str(error).startswith("Key mismatch"):
            return "signed with another key"
        if str(error).startswith("Signature mismatch"):
            named = [name or listed for name, listed in _MISMATCH.findall(str(error))]
            return (
                f"not as it was signed: {', '.join(target.name if name == '.' else name for name in named)}"
            )
        return f"{signature.name} is no signature of this form"
    return ""


class Review(Config):
    """What a reviewer signs: that a bundle may be used, judged by these numbers of it.

    Attributes:
        bundle: digest of the bundle.
        metrics: digest of the metrics.json that was read.
        reviewer: the name under which the gate knows the public key.
        statement: what the reviewer wants to say.
    """

    schema_version: Literal[1] = 1
    bundle: Digest
    metrics: Digest
    reviewer: str = Field(min_length=1)
    statement: str


def write_review(path: Path, review: Review, key: Path) -> None:
    """Write a review and its signature into the folder `path`, whole or not at all.

    Raises:
        ValueError: as `sign`.
    """
    with replacing(path) as folder:
        folder.mkdir()
        write_json(folder / REVIEW, review.model_dump(mode="json"))
        sign(folder / REVIEW, key, folder / REVIEW_SIGNATURE)


def read_review(path: Path) -> Review:
    """The review in a folder; whether its signature holds is `objection`'s matter.

    Raises:
        ValueError: if there is none.
    """
    try:
        return Review.model_validate(json.loads((path / REVIEW).read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        raise ValueError(f"{path}: no review of this version; write it with `cadx sign --reviewer`") from None


def objection(
    path: Path,
    reviewers: Mapping[str, str],
    *,
    bundle: Digest | None = None,
    metrics: Digest | None = None,
) -> str:
    """Why the review in a folder does not count, in words; empty where it does.

    Args:
        path: the folder.
        reviewers: name -> public key, PEM.
        bundle: what it must be about; None for any.
        metrics: digest of the numbers that it must rest on; None for any.

    Raises:
        ValueError: if there is no review, or a key is none.
    """
    review = read_review(path)
    if review.reviewer not in reviewers:
        return f"{review.reviewer} is not among the reviewers: {', '.join(reviewers)}"
    with TemporaryDirectory() as folder:
        public_key = Path(folder) / "reviewer.pub"
        public_key.write_text(reviewers[review.reviewer], encoding="utf-8")
        if wrong := check_signature(path / REVIEW, path / REVIEW_SIGNATURE, public_key):
            return wrong
    if bundle is not None and review.bundle != bundle:
        return "signed for another bundle"
    if metrics is not None and review.metrics != metrics:
        return "signed for other numbers than these"
    return ""
