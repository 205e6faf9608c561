"""Which files of a folder hold which tensors. The files themselves tell; an index decides only where it is true."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ingle.errors import ModelError
from ingle.weights.hf_config import read_json_object
from ingle.weights.pointer import refuse_adapter, refuse_pointer

MAX_INDEX_BYTES = 64 << 20

_BY_QUANTIZERS = re.compile(
    r"(?=.*(gptq|awq|(?<![a-z])\d[-_]?bits?(?![a-z])))[a-z0-9_][a-z0-9_.-]{0,200}\.safetensors", re.IGNORECASE
)
_SHARD_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")


def named_by_quantizers(names: Iterable[str]) -> list[str]:
    """Of files in a folder without model.safetensors those that are called as quantizers called the whole model, such
    as gptq_model-4bit-128g.safetensors."""
    return sorted(name for name in names if _BY_QUANTIZERS.fullmatch(name) and "-of-0" not in name)


@dataclass(frozen=True)
class Located:
    """The tensors of a checkpoint."""

    files: Mapping[str, Path]
    """Where each one lies."""
    absent: str | None = None
    """A file that the index lists and that is not there."""

    def file_of(self, name: str, folder: Path) -> Path:
        """Raises `ModelError` when no file in `folder` has the tensor."""
        if name in self.files:
            return self.files[name]
        if self.absent:
            refuse_pointer(folder / self.absent)
        if name.removesuffix("weight") + "base_layer.weight" in self.files:
            raise ModelError(
                f"{folder}: {name} lies beside an adapter (LoRA) that was not merged into it: merge it, with PEFT's "
                "merge_and_unload(), and save the model anew"
            )
        maybe = f"it may be in {self.absent}, which is missing: download that again" if self.absent else None
        raise ModelError(f"{folder}: has no tensor {name}, which the model needs", alternative=maybe)


@dataclass(frozen=True)
class CheckpointFiles:
    """How a folder's checkpoint files of one kind are called."""

    single: str
    suffix: str

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"

    def are_in(self, folder: Path) -> bool:
        return bool(self.names_in(folder))

    def names_in(self, folder: Path) -> list[str]:
        """Of the files that are there: those of the index, or the single one, or the shards."""
        for names in (self._claims(folder).values(), (self._single_in(folder),), self._shards(folder)):
            if found := [name for name in dict.fromkeys(names) if (folder / name).is_file()]:
                return found
        return []

    def paths(self, folder: Path) -> list[Path]:
        """Those that are there."""
        try:
            claimed = [*self._claims(folder).values()]
        except ModelError:
            claimed = []
        names = sorted({self._single_in(folder), *self._shards(folder), *claimed})
        return [folder / name for name in names if (folder / name).is_file()]

    def locate(self, folder: Path, names_in: Callable[[Path], Collection[str]]) -> Located:
        """The file of each tensor; `names_in` reads which tensors a file has.

        An index is followed where every file that it lists is there and has what it says. One that is not is left
        from other files: then the single file comes first, and what it lacks is looked for in the shards.
        Raises `ModelError` when there is no file at all, when the index names files outside the folder, or when two
        shards have a tensor of the same name and the index does not say which is meant.
        """
        claims = self._claims(folder)
        listed = sorted(set(claims.values()))
        absent = [shard for shard in listed if not (folder / shard).is_file()]
        held = {shard: names_in(folder / shard) for shard in listed if shard not in absent}
        if not absent and listed and all(name in held[shard] for name, shard in claims.items()):
            return Located(self._merged(folder, held, claims))
        whole: dict[str, Path] = {}
        single = self._single_in(folder)
        if (folder / single).is_file():
            whole = dict.fromkeys(names_in(folder / single), folder / single)
            held.pop(single, None)
        for shard in self._shards(folder):
            if shard not in held:
                held[shard] = names_in(folder / shard)
        if not whole and not held:
            for name in (self.single, self.index, *absent, TORCH_FILES.single, TORCH_FILES.index):
                refuse_pointer(folder / name)
            refuse_adapter(folder)
            if absent:
                raise ModelError(f"{folder}: {absent[0]} is missing, which {self.index} lists; download it again")
            if several := self._by_quantizers(folder):
                raise ModelError(
                    f"{folder}: holds several models ({', '.join(several)}), and no {self.single}",
                    alternative="put the one that is meant into a folder of its own, with the other files",
                )
            raise ModelError(f"{folder}: holds neither {self.single} nor {self.index}")
        lacking = {shard: [name for name in names if name not in whole] for shard, names in held.items()}
        return Located({**whole, **self._merged(folder, lacking, claims)}, absent[0] if absent else None)

    def _merged(self, folder: Path, held: Mapping[str, Collection[str]], claims: Mapping[str, str]) -> dict[str, Path]:
        """The file of each tensor in these shards, where the index claims one that has it, there."""
        shards: dict[str, str] = {}
        for shard, names in held.items():
            for name in names:
                claimed = claims.get(name)
                if name not in shards or claimed == shard:
                    shards[name] = shard
                elif claimed != shards[name]:
                    raise ModelError(
                        f"{folder}: both {shards[name]} and {shard} have a tensor {name[:200]}, and no {self.index} "
                        "says which is meant: remove the files that are not the model's"
                    )
        return {name: folder / shard for name, shard in shards.items()}

    def _single_in(self, folder: Path) -> str:
        """What the file is called that has the whole model, if there is one."""
        if (folder / self.single).is_file() or (folder / self.index).is_file() or self._shards(folder):
            return self.single
        others = self._by_quantizers(folder)
        return others[0] if len(others) == 1 else self.single

    def _by_quantizers(self, folder: Path) -> list[str]:
        if self.suffix != ".safetensors" or not folder.is_dir():
            return []
        return named_by_quantizers(file.name for file in folder.glob(f"*{self.suffix}"))

    def _shards(self, folder: Path) -> list[str]:
        """Files in the folder that are named as parts of a checkpoint."""
        stem = re.escape(self.single.removesuffix(self.suffix))
        pattern = re.compile(rf"{stem}-\d{{5}}-of-\d{{5}}{re.escape(self.suffix)}")
        return sorted(file.name for file in folder.glob(f"*{self.suffix}") if pattern.fullmatch(file.name))

    def _claims(self, folder: Path) -> dict[str, str]:
        """The file of each tensor, by the index; empty where there is none."""
        index = folder / self.index
        if not index.is_file():
            return {}
        claims = read_json_object(index, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(claims, dict) or not all(isinstance(shard, str) for shard in claims.values()):
            raise ModelError(f"{index}: weight_map does not map tensor names to file names")
        for shard in sorted(set(claims.values())):
            if not shard.endswith(self.suffix) or not _SHARD_STEM.fullmatch(shard.removesuffix(self.suffix)):
                raise ModelError(f"{index}: {shard[:100]!r} is not the name of a {self.suffix} file in this folder")
        return claims


SAFETENSORS_FILES = CheckpointFiles("model.safetensors", ".safetensors")
TORCH_FILES = CheckpointFiles("pytorch_model.bin", ".bin")
