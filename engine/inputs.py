"""
What a run is made from, so that it goes on with nothing else: places, problems and weights.
"""
import hashlib
import json
import os
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from tasks.errors import UserError


def absolute(name, exists=os.path.isfile):
    """The place of a file, as it is called from any folder; a name of the Hub stays as it is."""
    return os.path.abspath(name) if exists(name) else name


def digest_of(rows):
    """Identifies problems, in their order: "N problems, sha256 ..." of a list of dicts."""
    text = "".join(json.dumps(row, sort_keys=True, default=str) + "\n" for row in rows)
    return f"{len(rows):,} problems, sha256 {hashlib.sha256(text.encode()).hexdigest()[:32]}"


def digest_of_model(name):
    """Identifies the weights and settings of a model: "sha256 ...", or a Hub id's "commit ...".

    Of a file over 64 MiB it reads 256 blocks of 64 KiB, evenly spread, so that 15 GB take no
    longer than 16 MiB do. A change between these blocks is not detected.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            cached = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            cached = None
        if not isinstance(cached, str):
            return "not to be found"
        folder = Path(cached).parent
    if folder.parent.name == "snapshots":  # in the Hub's cache
        return f"commit {folder.name}"
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".safetensors", ".bin", ".json", ".jinja", ".model"):
            continue
        size = path.stat().st_size
        total.update(f"{path.name} {size}\n".encode())
        blocks, width = (256, 2**16) if size > 2**26 else (1, size)
        with path.open("rb") as file:
            for i in range(blocks):
                file.seek(i * (size - width) // max(1, blocks - 1))
                total.update(file.read(width))
    adapters = folder / "adapter_config.json"  # of --lora, which stand beside another model
    if adapters.exists():
        base = json.loads(adapters.read_text(encoding="utf-8"))["base_model_name_or_path"]
        total.update(digest_of_model(base).encode())
    return f"sha256 {total.hexdigest()[:32]}"


def refuse_changes(folder, before, now):
    """UserError for the first of the settings that is not as it was before."""
    for key, value in now.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            refuse_changes(folder, old, value)
        elif value != old:
            raise UserError(f"{folder} began with {key} {old}, so {value} needs a new folder")
