#!/usr/bin/env bash
# Builds on a machine without a GPU what prove.py and measure.py need on one, where nothing is compiled.
#
#   benchmarks/gpu/prepare.sh [--arch 9.0a] [--python 3.12] [--torch 2.11.0] [--env FOLDER] [--no-triton]
#                             [--archive FILE.tar]
#
# --arch     the target's compute capability, as TORCH_CUDA_ARCH_LIST spells it
# --python   the target's Python; --torch its PyTorch, of which headers and link libraries are used
# --env      a virtual environment with both; default: one is made in build/gpu, 6 GB
# --no-triton  leave out the Triton kernels, which are then compiled there; the environment that is made has not what
#            PyTorch depends on, so that its import is not tried here
# --archive  also write all that travels into one file
#
# Leaves sn_ops/_C.*.so and _C_cuda.so in place; in benchmarks/gpu/built the probe, the micro-benchmarks, the compiled
# Triton kernels (fill.py says which) and a manifest: the commit, the versions, the files' hashes. Lists what travels,
# and says what is missing.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/../.."

arch=9.0a python=3.12 torch=2.11.0 env='' archive='' triton=yes
limit_mib=64
say() { printf 'prepare: %s\n' "$*"; }
usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '$d'; }
while [ $# -gt 0 ]; do
  case $1 in -h | --help) usage; exit 0 ;; esac
  case $1 in --no-triton) triton='' && shift && continue ;; esac
  case $1 in --*) [ $# -gt 1 ] || { printf 'prepare: %s: expected a value\n' "$1"; exit 2; } ;; esac
  case $1 in
    --arch) arch=$2 ;;
    --python) python=$2 ;;
    --torch) torch=$2 ;;
    --env) env=$(cd "$caller" && cd "$2" 2>/dev/null && pwd) || { say "missing: an environment in $2"; exit 1; } ;;
    --archive) archive=$(cd "$caller" && cd "$(dirname "$2")" && pwd)/$(basename "$2") ;;
    *) usage; exit 2 ;;
  esac
  shift 2
done

missing=()

# ---- the target's Python and torch -------------------------------------------------------------------------------

if [ -z "$env" ]; then
  env=$PWD/build/gpu/env-$python-$torch
  if [ ! -x "$env/bin/python" ]; then
    interpreter=$(command -v "python$python" || true)
    [ -n "$interpreter" ] || { say "missing: python$python on PATH (or name an environment with --env)"; exit 1; }
    "$interpreter" -m venv "$env"
  fi
  if [ -n "$triton" ]; then
    # The interpreter of Triton 3.6 fails with later versions of NumPy.
    "$env/bin/python" -m pip install -q "torch==$torch" "numpy<2.4" pytest hypothesis scikit-learn
  else
    "$env/bin/python" -c 'import torch.version' 2>/dev/null ||
      "$env/bin/python" -m pip install -q --no-deps "torch==$torch"
  fi
  "$env/bin/python" -m pip install -q cmake ninja "setuptools>=77" typing_extensions
fi
if [ -n "$triton" ] && ! (cd / && "$env/bin/python" -c 'import torch, triton, numpy, pytest, hypothesis, sklearn'); then
  missing+=("what compiles Triton kernels in $env: it cannot import the above (--no-triton leaves them out)")
fi
found=$("$env/bin/python" - <<'PY'
import importlib.util, pathlib, re, sys
spec = importlib.util.find_spec("torch")
text = (pathlib.Path(spec.submodule_search_locations[0]) / "version.py").read_text() if spec else ""
version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
print(f"{sys.version_info[0]}.{sys.version_info[1]}", version[1] if version else "none")
PY
)
[ "${found%% *}" = "$python" ] || missing+=("Python $python in $env: it has ${found%% *}")
case ${found#* } in "$torch" | "$torch+"*) ;; *) missing+=("torch $torch in $env: it has ${found#* }") ;; esac
command -v nvcc >/dev/null || [ -n "${CUDA_HOME:-}" ] || missing+=("nvcc on PATH, or CUDA_HOME")
if [ ${#missing[@]} -gt 0 ]; then
  printf 'prepare: missing: %s\n' "${missing[@]}"
  exit 1
fi
PATH=$env/bin:$PATH
export TORCH_CUDA_ARCH_LIST=$arch

# If this run fails, what an earlier one built must not pass for its own.
built=benchmarks/gpu/built
rm -rf "$built" && mkdir -p "$built"

# ---- the libraries and the programs --------------------------------------------------------------------------------

say "the libraries, for $arch under Python ${found/ /, torch }"
mkdir -p build/gpu
if ! SN_OPS_CUDA=1 python setup.py -q build_ext --inplace >build/gpu/libraries.log 2>&1; then
  tail -n 30 build/gpu/libraries.log
  exit 1
fi
say "the probe and the micro-benchmarks"
tree=build/gpu/programs-$arch
if ! { cmake -S . -B "$tree" -G Ninja -DSN_OPS_CUDA=OFF -DSN_OPS_CUDA_OBJECTS=ON &&
  cmake --build "$tree" --target sn_gpu_probe sn_gpu_micro; } >build/gpu/programs.log 2>&1; then
  tail -n 30 build/gpu/programs.log
  exit 1
fi
for program in sn_gpu_probe sn_gpu_micro; do
  install -s "$tree/$program" "$built/$program"
done

# ---- do they load ---------------------------------------------------------------------------------------------------

# What torch itself depends on may be missing (--no-deps). Where it is there, the libraries must load.
if (cd / && python -c 'import torch' 2>/dev/null); then
  PYTHONPATH=$PWD python - <<'PY' || exit 1
import torch, sn_ops
from sn_ops import dispatch
assert dispatch.CORE is not None, dispatch.LOAD_ERROR
assert "cuda" not in dispatch.LOAD_ERROR, dispatch.LOAD_ERROR["cuda"]
build = dispatch.CORE.build_info()
print(f"prepare: they load under torch {torch.__version__}; built for {build['cuda_architectures']}")
PY
else
  say "not checked that they load: torch in $env has not what it needs to be imported"
fi

# ---- Triton's kernels ----------------------------------------------------------------------------------------------

# The check is made in a copy elsewhere: an entry of Triton's cache must not depend on the path of the checkout.
triton_kernels() {
  local copy=build/gpu/elsewhere status
  PYTHONPATH=$PWD:$PWD/benchmarks/gpu \
    python benchmarks/gpu/fill.py "$built/triton.tar.gz" --capability "$arch" || return
  rm -rf "$copy" && mkdir -p "$copy" && cp -r sn_ops benchmarks "$copy" || return
  PYTHONPATH=$PWD/$copy:$PWD/$copy/benchmarks/gpu \
    python "$copy/benchmarks/gpu/fill.py" "$built/triton.tar.gz" --capability "$arch" --check
  status=$?
  rm -rf "$copy"
  return $status
}
if [ -n "$triton" ]; then
  say "the Triton kernels, by Triton $(python -c 'import triton; print(triton.__version__)')"
  if ! triton_kernels >build/gpu/triton.log 2>&1; then
    tail -n 30 build/gpu/triton.log
    exit 1
  fi
  grep '^fill: ' build/gpu/triton.log | sed 's/^fill/prepare/'
fi

# ---- what travels ----------------------------------------------------------------------------------------------------

python - "$arch" "${found#* }" "$limit_mib" "$archive" ${triton:+"$built/triton.tar.gz"} <<'PY'
import datetime
import glob
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile

arch, torch, limit, archive = sys.argv[1], sys.argv[2], int(sys.argv[3]) << 20, sys.argv[4]

def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

suffix = output(sys.executable, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))").strip()
built = [f"sn_ops/_C{suffix}", "sn_ops/_C_cuda.so", *sorted(glob.glob("benchmarks/gpu/built/sn_gpu_*")), *sys.argv[5:]]
missing = [name for name in built if not os.path.exists(name)]
home = os.environ.get("CUDA_HOME", "")
nvcc = output(f"{home}/bin/nvcc" if home else "nvcc", "--version")
manifest = {
    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    "commit": output("git", "rev-parse", "HEAD").strip(),
    "dirty": output("git", "status", "--porcelain") != "",
    "architecture": arch,
    "torch": torch,
    "nvcc": (re.search(r"V([\d.]+)", nvcc) or ["", "unknown"])[1],
    "files": {n: hashlib.sha256(pathlib.Path(n).read_bytes()).hexdigest() for n in built if n not in missing},
}
path = pathlib.Path("benchmarks/gpu/built/manifest.json")
path.write_text(json.dumps(manifest, indent=1) + "\n")
listed = output("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
tracked = [name for name in listed if os.path.isfile(name) and os.path.abspath(name) != archive]
carried = [name for name in [*built, str(path)] if name not in missing]
size = sum(os.path.getsize(name) for name in {*tracked, *carried})
print("prepare: besides the checkout these travel:")
for name in carried:
    print(f"prepare:   {os.path.getsize(name) / 2**20:6.1f} MiB  {name}")
print(f"prepare: {size / 2**20:.1f} MiB in all, of {limit >> 20}")
if manifest["dirty"]:
    print("prepare: the checkout has changes that are not committed: a record of it cannot be published")
if missing:
    sys.exit("prepare: missing: " + ", ".join(missing))
if size > limit:
    sys.exit(f"prepare: too much to travel: {size / 2**20:.1f} MiB of {limit >> 20}")
if archive:
    with tarfile.open(archive, "w") as tar:
        for name in sorted({*tracked, *carried}):
            tar.add(name, recursive=False)
    print(f"prepare: all of it is in {archive}")
PY
