"""The step "facts": the libraries load, and what device, driver and versions they meet."""

from __future__ import annotations

from typing import Any

import torch

import manifest
import protocol
import runner
import sn_ops
from sn_ops import dispatch


def device_facts() -> dict[str, Any]:
    """Facts of the first device, from torch."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "shared_bytes": getattr(properties, "shared_memory_per_block_optin", 0),  # torch's annotations lack it
    }


def pretended_facts() -> dict[str, Any]:
    """Facts of a device that is pretended."""
    return {
        "name": "pretended",
        "capability": "9.0",
        "multiprocessors": 132,
        "memory_bytes": 0,
        "l2_bytes": 0,
        "shared_bytes": 232448,
        "wide_clusters": 0,
        "driver": "none",
        "clocks_mhz": None,
    }


def main() -> None:
    """Report them; fail where the backend is not usable or a call gives a wrong result."""
    core: Any = dispatch.CORE
    if core is None:
        protocol.fail(dispatch.LOAD_ERROR["cpu"])
    build = core.build_info()
    pretend = protocol.pretending()
    device = pretended_facts() if pretend else device_facts() if torch.cuda.is_available() else None
    backends = {name: {"usable": info.usable, "reason": info.reason} for name, info in sn_ops.backends().items()}
    if device and not pretend and backends["cuda"]["usable"]:
        device["wide_clusters"] = torch.ops.sn_ops.cuda_wide_clusters(0)
    protocol.say(
        provenance={
            **({"device": device} if device else {}),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "sn_ops": sn_ops.__version__,
            "build": build,
        },
        backends=backends,
    )
    if device is None:
        protocol.fail(f"torch {torch.__version__} finds no GPU")
    if not pretend:
        print(runner.output_of("nvidia-smi"))
    if not pretend and not backends["cuda"]["usable"]:
        reason = f"the backend 'cuda' is not usable: {backends['cuda']['reason']}"
        if not backends["triton"]["usable"]:
            protocol.fail(reason)
        print(f"{reason}. Triton's steps alone are run", flush=True)
    known = manifest.read()
    changed = (manifest.state(known) or {}).get("changed_since")
    if changed and not pretend:
        protocol.fail(f"not the files that were built: {', '.join(changed)}; run prepare.sh again")
    where = torch.device("cpu" if pretend else "cuda")
    feats = torch.eye(4, 8, device=where)
    loss = sn_ops.sn_loss(feats, torch.tensor([0, 0, 1, 1], device=where), k=2)
    if not bool(torch.isfinite(loss)):
        protocol.fail(f"the loss of four unit rows is {float(loss)}")
    built, head = known.get("commit", "")[:10], (runner.provenance([])["commit"] or "")[:10]
    stale = f"; LIBRARIES OF {built}, tree of {head}" if known and built != head else ""
    architectures = build["cuda_architectures"] or "CPUs"
    protocol.say(figure=f"{device['name']}, torch {torch.__version__}, built for {architectures}{stale}")


if __name__ == "__main__":
    main()
