"""`python -m sn_ops`: which backends work here, and what they were built from."""

from __future__ import annotations

import platform

import torch

from . import __version__, backends, dispatch


def _facts() -> dict[str, str]:
    cuda = torch.version.cuda or "none"
    facts = {
        "sn_ops": f"{__version__}, {dispatch.__file__.removesuffix('/dispatch.py')}",
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, CUDA {cuda}, {torch.get_num_threads()} CPU threads",
    }
    if dispatch.CORE is not None:
        build = dispatch.CORE.build_info()
        facts["built with"] = f"{build['compiler']}, torch {build['torch']}"
        facts["CUDA kernels"] = build["cuda"]
        if build["cuda_architectures"]:
            facts["CUDA kernels"] += f" for {build['cuda_architectures']}"
        usable = ", ".join(dispatch.CORE.cpu_capabilities())
        capability, _ = dispatch.cpu_capability()
        facts["CPU kernels"] = f"{capability or 'none'} in use; usable here: {usable}"
        reason = dispatch.AUTOGRAD_REASON
        facts["autograd"] = f"in Python: {reason}" if reason else "in C++"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        facts[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    return facts


def main() -> None:
    """Prints the facts about this installation, then each backend with the devices it serves or why it cannot."""
    facts = _facts()
    width = max(map(len, (*facts, *backends())))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")
    print("\nbackends")
    for name, info in backends().items():
        state = f"usable, for {' and '.join(info.devices) or 'any'} tensors" if info.usable else f"no: {info.reason}"
        print(f"{name:<{width}}  {state}")


if __name__ == "__main__":
    main()
