"""`emoe doctor`."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from emoe.cli.options import Json, Quiet
from emoe.errors import UserError
from emoe.runtime import cache_home, format_bytes, free_bytes, processor

PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "safetensors",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "peft",
    "gguf",
    "torchao",
    "bitsandbytes",
    "trl",
    "lm_eval",
)
"""Those whose versions are told: what we stand on, and what can be used with a converted model."""


def doctor(
    build: Annotated[bool, typer.Option("--build", help="Compile the C++ kernels now, not on first use.")] = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say which sparse kernels will run on this machine, and why; versions, threads, cache and free disk."""
    from emoe_kernels import dispatch, extension

    try:
        dispatch.requested()
    except ValueError as error:
        raise UserError(str(error)) from None
    if build:
        extension.logger.disabled = True  # it would say the same
        built = extension.load()
        extension.logger.disabled = False
        if not built:
            raise UserError(f"--build: {extension.status().detail}")
    found = examine()
    if json_output:
        print(json.dumps(found, indent=2))
    elif not quiet:
        _print(found)


def examine() -> dict[str, Any]:
    """What this machine has and what runs on each of its devices. Compiles nothing."""
    import torch

    import emoe
    from emoe_kernels import dispatch, extension

    status, features = extension.status(), extension.features()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    devices = ["cpu", *(f"cuda:{i}" for i in range(len(gpus)))]
    return {
        "devices": [{"device": device, **_what_runs(device.split(":")[0])} for device in devices],
        "EMOE_KERNELS": os.environ.get(dispatch.ENVIRONMENT_VARIABLE),
        "versions": {
            "emoe": emoe.__version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
        },
        "cpu": {
            "name": processor(),
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "avx512_bf16": "avx512_bf16" in features,
            "amx_bf16": "amx_bf16" in features,
        },
        "extension": {
            "available": status.available,
            "detail": status.detail,
            "path": str(status.path) if status.path else None,
            "dtypes": ["float32", *(["bfloat16"] if features & {"avx512_bf16", "amx_bf16"} else [])],
            "compiler": extension.compiler(),
        },
        "cache": _cache(),
        "free_disk_bytes": {str(folder): free_bytes(folder) for folder in (Path.cwd(), Path(tempfile.gettempdir()))},
        "gpus": [
            {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory}
            for gpu in gpus
        ],
    }


def _cache() -> dict[str, Any]:
    """Where fetched models lie, and how much they take."""
    folder = cache_home()
    size = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()) if folder.is_dir() else 0
    return {"folder": str(folder), "bytes": size, "free_bytes": free_bytes(folder)}


def _what_runs(device_type: str) -> dict[str, str | None]:
    from emoe_kernels.dispatch import explain

    try:
        name, reason = explain(device_type)
    except (ValueError, RuntimeError) as error:  # asked for by name, and not to be had here
        name, reason = None, str(error)
    return {"implementation": name, "reason": reason}


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table

    from emoe.report.terminal import terminal

    table = Table()
    for heading in ("device", "kernels", "why"):
        table.add_column(heading)
    for row in found["devices"]:
        table.add_row(row["device"], row["implementation"] or "none", row["reason"])
    terminal().print(table)

    cpu, extension = found["cpu"], found["extension"]
    asked = found["EMOE_KERNELS"]
    print("EMOE_KERNELS: " + (f"{asked}" if asked else "not set; the fastest that runs here is taken"))
    print("versions:     " + ", ".join(f"{k} {v or 'not installed'}" for k, v in found["versions"].items()))
    extras = [flag for flag in ("avx512_bf16", "amx_bf16") if cpu[flag]]
    threads, cores = (f"{cpu[what]} {what[:-1] if cpu[what] == 1 else what}" for what in ("threads", "cores"))
    print(f"processor:    {cpu['name']}; {threads} on {cores}")
    if cpu["threads"] > cpu["cores"]:
        print("              more threads than cores wait for each other; set OMP_NUM_THREADS to the number of cores")
    print("instructions: " + ", ".join([cpu["capability"], *extras]))
    print(f"compiler:     {extension['compiler'] or 'none'}")
    print(f"C++ kernels:  {extension['detail']}" + (f" ({extension['path']})" if extension["available"] else ""))
    if extension["available"]:
        print(f"              compute {' and '.join(extension['dtypes'])}; other dtypes run on plain PyTorch")
    cache, disks = found["cache"], found["free_disk_bytes"]
    print(f"cache:        {format_bytes(cache['bytes'])} in {cache['folder']} ($EMOE_HOME moves it)")
    free = {cache["folder"]: cache["free_bytes"], **disks}
    print("free disk:    " + ", ".join(f"{format_bytes(count)} in {where}" for where, count in free.items()))
    gpus = [f"{gpu['name']} ({gpu['capability']}, {format_bytes(gpu['memory_bytes'])})" for gpu in found["gpus"]]
    print("GPUs:         " + (", ".join(gpus) or "none"))
