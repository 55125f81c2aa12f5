"""Trained models by name, each with a card that says how it was made (extra: zoo).

A zoo is a folder, or an address on a server. A model of it is two files: `NAME.safetensors`, the weights, and
`NAME.json`, the card. The networks are those of the examples, which are installed with the package.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqdisent import _files
from seqdisent._downloads import cache_folder, fetch, verify

__all__ = ["ZooModel", "load", "save"]

FORMAT = 1  # of the card
LIMIT = 5 * 2**20  # bytes of a model's weights
CARD_LIMIT = 2**20
PACKAGES = ("seqdisent", "torch", "pyro-ppl")  # whose versions a card has; of a checkout that is not installed, null
FIELDS: dict[str, type] = {
    "format": int, "name": str, "example": str, "frame_shape": list, "sizes": dict, "static": list, "motion": list,
    "data": str, "command": str, "seed": int, "metrics": dict, "versions": dict, "licence": str, "sha256": str,
    "bytes": int,
}  # fmt: skip
_HERE = Path(__file__).parent  # where a wheel has the examples; a checkout has them beside it
_EXAMPLES = _HERE / "_examples" if (_HERE / "_examples").is_dir() else _HERE.parent / "examples"
_IMPORTING = threading.Lock()


class ZooModel(NamedTuple):
    """A trained model. Its network can be copied, not pickled, since no import finds its class: save its `state_dict`.

    Attributes:
        network: the module with its trained weights, in eval mode, on the CPU.
        model: its generative program.
        guide: its inference program.
        static: the sites of what stays in a sequence.
        motion: the sites of what changes.
        card: what `NAME.json` holds: data, command, seed, metrics, versions, licence and more.
    """

    network: nn.Module
    model: Callable[..., Any]
    guide: Callable[..., Any]
    static: tuple[str, ...]
    motion: tuple[str, ...]
    card: dict[str, Any]


def load(name: str, *, source: str | Path | None = None, timeout: float = 60.0) -> ZooModel:
    """Return a trained model of a zoo.

    What an address serves is fetched once, into the folder `zoo` of the cache (`$SEQDISENT_CACHE`), and kept if it has
    the size and the SHA-256 of its card. Nothing is unpickled, and no code of the zoo runs.

    Args:
        name: of the model, such as ``"vdsm-pendulum"``: lower-case letters, digits, dots, hyphens and underscores.
        source: the zoo: a folder, or an address that begins with ``https://`` or ``http://``. Default:
            `$SEQDISENT_ZOO`.
        timeout: seconds that a download may stall.

    Returns:
        The network with its programs, the names of its sites, and its card.

    Raises:
        ValueError: `name` is no such name; neither `source` nor `$SEQDISENT_ZOO` is set; a card is not JSON, is of
            another format or lacks a field; weights differ from the size or SHA-256 of the card, are not safetensors,
            or do not fit the network; `static` and `motion` are not those of the example.
        FileNotFoundError: there is no such folder, or it has no such model.
        ConnectionError: a download failed.
        ImportError: a package of the extra `zoo` is missing.
    """
    zoo = str(source or os.environ.get("SEQDISENT_ZOO") or "")
    if not zoo:
        raise ValueError(f"source: got {source!r}, and SEQDISENT_ZOO is not set; expected a folder or an address")
    remote = zoo.startswith(("https://", "http://"))
    card_path, path = _fetched(zoo.rstrip("/"), name, timeout) if remote else _paths(zoo, name)
    if missing := [each for each in (card_path, path) if not each.is_file()]:
        if not path.parent.is_dir():
            raise FileNotFoundError(f"source: there is no folder {path.parent}")
        known = sorted(found.stem for found in path.parent.glob("*.json"))
        raise FileNotFoundError(f"name: got {name!r}, but there is no {missing[0]}; expected one of {known}")
    what = f"{card_path}, a copy in the cache (remove it to fetch it again)" if remote else str(card_path)
    card, content = _read_card(card_path.read_bytes(), name, what), path.read_bytes()
    _check(content, card, str(path), "remove it and its card, and fetch or pack the model again")
    safetensors = _safetensors()
    try:
        tensors = safetensors.load(content)
    except Exception as error:  # a damaged file fails in any of many ways
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from error
    network: Any = _build(card, tensors, str(path))
    return ZooModel(network, network.model, network.guide, tuple(card["static"]), tuple(card["motion"]), card)


def save(
    network: nn.Module, folder: str | Path, name: str, *, example: str, frame_shape: Sequence[int],
    sizes: Mapping[str, Any], static: Sequence[str], motion: Sequence[str], data: str, command: str, seed: int,
    metrics: Mapping[str, Any], licence: str,
) -> Path:  # fmt: skip
    """Write a trained network of an example as a model of a zoo, unless :func:`~seqdisent.load` would refuse it.

    `python examples/vdsm.py pack RUN` calls this on a finished run.

    Args:
        network: the trained network.
        folder: of the zoo; it is made if it is not there. A model of this name is replaced.
        name: of the model, as :func:`~seqdisent.load` takes it.
        example: whose network it is, such as ``"vdsm"``.
        frame_shape: of what the network reads, without batch and time.
        sizes: the arguments that the network was built from, as JSON has them.
        static: the sites of what stays in a sequence.
        motion: the sites of what changes.
        data: what it was trained on.
        command: which trains it again.
        seed: of the training.
        metrics: what was measured on data held out, as JSON has it.
        licence: under which the weights may be used.

    Returns:
        The path of the card.

    Raises:
        ValueError: `name` is no such name, `sizes` or `metrics` are not JSON, the weights take more than 5 MB (5 times
            2**20 bytes), a weight is not finite, `static` and `motion` are not those of `example`, or the network is
            not what `example`, `frame_shape` and `sizes` build.
        ImportError: a package of the extra `zoo` is missing.
        OSError: a file could not be written.
    """
    card_path, path = _paths(folder, name)
    # each tensor with memory of its own: safetensors refuses those that share it
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in network.state_dict().items()}
    if bad := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"network: {bad[0]} is not finite")
    content: bytes = _safetensors().save(tensors)
    if len(content) > LIMIT:
        raise ValueError(
            f"network: its weights take {len(content) / 2**20:.1f} MB, expected at most {LIMIT >> 20} MB; "
            "smaller sizes, such as the channels of its encoder and decoder, make it fit"
        )
    versions = {each: next((found.version for found in distributions(name=each)), None) for each in PACKAGES}
    card = {
        "format": FORMAT, "name": name, "example": example, "frame_shape": list(frame_shape), "sizes": dict(sizes),
        "static": list(static), "motion": list(motion), "data": data, "command": command, "seed": seed,
        "metrics": dict(metrics), "versions": versions, "licence": licence,
        "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content),
    }  # fmt: skip
    try:
        text = json.dumps(card, indent=2, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"sizes, metrics: expected finite numbers, text, lists and dicts ({error})") from error
    _build(_read_card(text, name, "card"), tensors, "network")
    card_path.unlink(missing_ok=True)  # of a model that is replaced
    _files.write(path, content)
    _files.write(card_path, text)  # last: what has a card is whole
    return card_path


def _paths(folder: str | Path, name: str) -> tuple[Path, Path]:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):  # or it might name a file elsewhere
        raise ValueError(f"name: got {name!r}, expected lower-case letters, digits, and '.', '_', '-' but not first")
    return Path(folder) / f"{name}.json", Path(folder) / f"{name}.safetensors"


def _fetched(address: str, name: str, timeout: float) -> tuple[Path, Path]:
    """Return the files of a model in the cache, fetched if they are not there."""
    paths = _paths(cache_folder() / "zoo" / hashlib.sha256(address.encode()).hexdigest()[:16], name)
    if not all(path.is_file() for path in paths):
        card_url, url = (f"{address}/{path.name}" for path in paths)
        text = fetch(card_url, timeout, limit=CARD_LIMIT)
        card, content = _read_card(text, name, card_url), fetch(url, timeout, limit=LIMIT)
        _check(content, card, url, "nothing was kept; try again or another source")
        _files.write(paths[1], content, several_writers=True)
        _files.write(paths[0], text, several_writers=True)
    return paths


def _read_card(content: bytes, name: str, what: str) -> dict[str, Any]:
    try:
        card = json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: cannot be read as JSON ({error})") from error
    if not isinstance(card, dict):
        raise ValueError(f"{what}: is a {type(card).__name__}, expected a dict")
    for field, kind in FIELDS.items():
        got, expected = card.get(field), {"format": FORMAT, "name": name}.get(field)
        if type(got) is not kind or expected not in (None, got):
            raise ValueError(f"{what}: {field} is {got!r}, expected {expected or kind.__name__}")
    return card


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _check(content: bytes, card: Mapping[str, Any], what: str, remedy: str) -> None:
    if card["bytes"] > LIMIT:
        raise ValueError(f"{what}: bytes is {card['bytes']}, expected at most {LIMIT}")
    if len(content) != card["bytes"]:
        raise ValueError(f"{what}: has {len(content)} bytes, expected {card['bytes']}; {remedy}")
    verify(content, card["sha256"], what, remedy)


def _build(card: Mapping[str, Any], tensors: Mapping[str, Tensor], what: str) -> nn.Module:
    """Return the network of a card with these weights, in eval mode."""
    known = sorted(path.stem for path in _EXAMPLES.glob("*.py") if (_EXAMPLES / "presets" / path.stem).is_dir())
    if (name := card["example"]) not in known:
        raise ValueError(f"example: got {name!r}, expected one of {known}")
    example, shape = _example(name), tuple(card["frame_shape"])
    for field in ("static", "motion"):
        if card[field] != (sites := list(getattr(example, field))):
            raise ValueError(f"{field}: got {card[field]}, expected {sites}, which are those of {name}")
    sizes = {key: tuple(value) if isinstance(value, list) else value for key, value in card["sizes"].items()}
    counts = [(key, each) for key, value in sizes.items() for each in (value if isinstance(value, tuple) else [value])]
    of_all = sum(tensor.numel() for tensor in tensors.values())
    if large := [f"{key}: got {each}" for key, each in counts if isinstance(each, int) and each > of_all]:
        raise ValueError(f"sizes: {', '.join(large)}, expected at most the {of_all} numbers of {what}")

    def build(device: str) -> Any:
        # the first weights are replaced, so they take nothing from the caller's generator
        with torch.random.fork_rng(devices=[]), torch.device(device), _float32():
            try:
                return example.build(shape, example.sizes(**sizes) if example.sizes else sizes)
            except Exception as error:  # of any kind: not every example checks its sizes
                raise ValueError(f"sizes: {sizes} build no {name} for frames of shape {shape} ({error})") from error

    def shapes(state: Mapping[str, Tensor]) -> dict[str, str]:
        return {key: f"{value.dtype} {tuple(value.shape)}" for key, value in state.items()}

    found, wanted = shapes(tensors), shapes(build("meta").state_dict())  # of sizes that need not fit into memory
    differ = sorted({key for key, _ in found.items() ^ wanted.items()})
    if differ:
        shown = [f"{key} is {found.get(key, 'missing')}, expected {wanted.get(key, 'none')}" for key in differ[:3]]
        raise ValueError(f"{what}: its tensors do not fit {name} ({len(differ)} differ): {'; '.join(shown)}")
    network: nn.Module = build("cpu")
    network.load_state_dict(tensors)
    return network.eval()


@contextlib.contextmanager
def _float32() -> Iterator[None]:
    """Build in the dtype that weights are packed in, whatever the caller's default is."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


@cache
def _example(name: str) -> Any:
    """Import an example.

    The examples import each other by bare names (`settings`), which the user's own modules may have too. So the user's
    are put aside meanwhile, and the examples' are taken out afterwards.
    """
    names = {path.stem for path in _EXAMPLES.glob("*.py")}
    with _IMPORTING:
        of_the_user = {each: sys.modules.pop(each) for each in names & sys.modules.keys()}
        sys.path.insert(0, str(_EXAMPLES))
        try:
            return importlib.import_module(name).EXAMPLE
        except ImportError as error:
            raise ImportError(f"{error}; the zoo needs the examples' packages: pip install 'seqdisent[zoo]'") from error
        finally:
            sys.path.remove(str(_EXAMPLES))
            for each in names & sys.modules.keys():
                del sys.modules[each]
            sys.modules.update(of_the_user)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("the zoo needs safetensors; install it with: pip install 'seqdisent[zoo]'") from error
    return safetensors.torch
