#!/usr/bin/env bash
# What only a GPU can show, in ten minutes, unattended and without a network:
#
#     benchmarks/gpu.sh [FOLDER]          default: benchmarks/gpu-results
#
#     tests marked `gpu` ─► seconds of pruning at the width of a 7B model ─► packed kernels ─► FOLDER/gpu.json
#
# The package is installed as the README says, with torch for this GPU. Each step has its own limit in seconds and its own
# log in FOLDER; one that fails or takes too long is noted, and the next one begins. Exit status: 0 if every step went well,
# 1 if one did not, 2 where there is no GPU.
#
# Environment variables: LVLM_GPU_SECONDS is the limit of the longest step (default 150; others have half of it).
# LVLM_GPU_TRY=1 tries the script itself on small models, and LVLM_GPU_DEVICE=cpu does so without a GPU.
set -u
cd "$(dirname "$0")/.." || exit 2
folder="${1:-benchmarks/gpu-results}"
device="${LVLM_GPU_DEVICE:-cuda}"
longest="${LVLM_GPU_SECONDS:-150}"
shorter=$(((longest + 1) / 2))
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONUNBUFFERED=1

if [ "$device" = cuda ] && ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "error: torch sees no CUDA device here" >&2
    exit 2
fi
mkdir -p "$folder" || exit 2
rm -f "$folder"/steps.tsv "$folder"/*.log "$folder"/speed-*.json "$folder"/packed-*.json

# step NAME SECONDS COMMAND...: run it, keep what it prints, note how it ended.
step() {
    local name="$1" limit="$2" started status
    shift 2
    echo "$name ..."
    started=$SECONDS
    timeout --kill-after=10 "$limit" "$@" >"$folder/$name.log" 2>&1
    status=$?
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - started))" >>"$folder/steps.tsv"
    case "$status" in
        0) tail -n 1 "$folder/$name.log" ;;
        124 | 137) echo "    stopped after $limit s" ;;
        *) echo "    exit status $status, see $folder/$name.log" ;;
    esac
}

sizes=(--preset 7b --blocks 2 --samples 16 --dtype bfloat16)
small=()
if [ -n "${LVLM_GPU_TRY:-}" ] || [ "$device" != cuda ]; then
    sizes=(--preset mid --blocks 2 --samples 2 --visual 60 --text 20)
    small=(--small)
fi

# Where there is no GPU, each test is skipped.
step tests "$longest" python -m pytest -q -m gpu -p no:cacheprovider tests/integration/test_gpu.py

for recipe in wanda atv sparsegpt best; do
    if [ -f "configs/prune/$recipe.yaml" ]; then
        step "speed-$recipe" "$longest" python benchmarks/prune_speed.py --json "$folder/speed-$recipe.json" \
            --recipes "$recipe" --device "$device" --repetitions 2 "${sizes[@]}"
    fi
done

step packed "$shorter" python -m benchmarks.packed_gpu --json "$folder/packed-products.json" --device "$device" "${small[@]}"

python - "$folder" "$device" <<'END'
import datetime, json, pathlib, platform, sys

import torch

folder, device = pathlib.Path(sys.argv[1]), sys.argv[2]
steps = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
found = {
    "date": str(datetime.date.today()),
    "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "steps": {name: {"status": int(status), "seconds": int(seconds)} for name, status, seconds in steps},
    "results": {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*-*.json"))},
}
(folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
failed = [name for name, status, _ in steps if status != "0"]
print(f"wrote {folder / 'gpu.json'}" + (f"; not well: {', '.join(failed)}" if failed else ""))
sys.exit(bool(failed))
END
