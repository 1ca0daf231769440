#!/usr/bin/env bash
# Builds, tests and measures genperf on a machine with a GPU, from a bare checkout and without network.
#
#   tools/gpu_check.sh [--sanitize] OUT_DIR
#
# Needs python3 with torch, pybind11, cmake, ninja, setuptools and pytest, and nvcc. Nothing is installed outside OUT_DIR.
# Leaves OUT_DIR/<device>.json, tests.xml and the log of every phase, and ends with a table of the timings. The exit
# status is 0 only if every phase passed and at least one GPU test ran. Takes at most nine minutes.
#
#   --sanitize   also run the GPU tests of the CUDA kernels under compute-sanitizer (memcheck, racecheck)
#   PYTHON       the interpreter (python3)
#   GENPERF_CUDA_ARCHITECTURES   by default this GPU's alone
set -uo pipefail

readonly LIMIT_SECONDS=530
PYTHON=${PYTHON:-python3}

usage() {
  echo "usage: tools/gpu_check.sh [--sanitize] OUT_DIR" >&2
  exit 2
}

sanitize=false
out=
for argument in "$@"; do
  case $argument in
    --sanitize) sanitize=true ;;
    -*) usage ;;
    *)
      [[ -z $out ]] || usage
      out=$argument
      ;;
  esac
done
[[ -n $out ]] || usage

mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
cd "$root" || exit 2

failed=()

# phase NAME SECONDS COMMAND...: runs the command with its output in OUT_DIR/NAME.log, within its own time and
# what is left of the whole.
phase() {
  local name=$1 seconds=$2 left=$((LIMIT_SECONDS - SECONDS)) start=$SECONDS status
  shift 2
  ((seconds > left)) && seconds=$left
  if ((seconds < 5)); then
    printf '%-12s not run: out of time\n' "$name"
    failed+=("$name")
    return 1
  fi
  timeout --kill-after=5 "$seconds" "$@" >"$out/$name.log" 2>&1
  status=$?
  if ((status == 0)); then
    printf '%-12s passed  %4d s\n' "$name" $((SECONDS - start))
    return 0
  fi
  failed+=("$name")
  printf '%-12s FAILED  %4d s  exit status %d%s, log in %s\n' "$name" $((SECONDS - start)) "$status" \
    "$( ((status == 124 || status == 137)) && echo ' (time limit)')" "$out/$name.log"
  tail -n 25 "$out/$name.log" | sed 's/^/    /'
  return 1
}

finish() {
  if ((${#failed[@]})); then
    printf '\ngpu_check: FAILED in %d s: %s\n' "$SECONDS" "${failed[*]}"
  else
    printf '\ngpu_check: passed in %d s\n' "$SECONDS"
  fi
  if [[ -s ${results:-} ]]; then
    echo
    "$PYTHON" -m genperf bench report "$results"
  fi
  exit $((${#failed[@]} > 0))
}

read -r -d '' describe <<'PYTHON'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU")
properties = torch.cuda.get_device_properties(0)
print(f"{properties.major}{properties.minor}", "-".join(properties.name.lower().split()))
PYTHON
if ! description=$("$PYTHON" -c "$describe"); then
  failed+=(device)
  finish
fi
read -r capability device <<<"$description"
{
  "$PYTHON" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)'
  nvcc --version | tail -n 2
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  git rev-parse HEAD 2>/dev/null
} >"$out/environment.txt" 2>&1
echo "$device, compute capability $capability"

export GENPERF_CUDA=ON GENPERF_CUDA_ARCHITECTURES=${GENPERF_CUDA_ARCHITECTURES:-$capability-real}
phase build 240 \
  "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --target "$site" . || finish

# The checkout's own genperf/ has no native module: keep it off the path.
export PYTHONPATH=$site PYTHONSAFEPATH=1
phase import 60 "$PYTHON" -c "
import pathlib, genperf
assert pathlib.Path(genperf.__file__).is_relative_to('$site'), genperf.__file__
import genperf._native
genperf._native.cuda" || finish
phase doctor 60 "$PYTHON" -m genperf

phase tests 240 "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider --junitxml="$out/tests.xml"
tail -n 1 "$out/tests.log" 2>/dev/null
if ! "$PYTHON" - "$out/tests.xml" <<'PYTHON'
import sys
import xml.etree.ElementTree
try:
    suites = list(xml.etree.ElementTree.parse(sys.argv[1]).iter("testsuite"))
except (OSError, xml.etree.ElementTree.ParseError) as error:
    sys.exit(f"no test report: {error}")
ran = sum(int(s.get("tests")) - int(s.get("skipped")) for s in suites)
sys.exit(0 if ran else "no GPU test ran")
PYTHON
then
  failed+=(tests-ran)
fi

if $sanitize; then
  for tool in memcheck racecheck; do
    phase "$tool" 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m pytest -m gpu -k "cuda and not graph" -q -x -p no:cacheprovider
  done
fi

results=$out/$device.json
rm -f "$results"
phase bench 150 "$PYTHON" -m genperf bench --device cuda --json "$results"
phase sampling 120 "$PYTHON" -m genperf bench sampling --quick --device cuda --json "$out/$device-sampling.json"
finish
