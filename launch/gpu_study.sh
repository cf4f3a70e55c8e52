#!/usr/bin/env bash
# What a GPU gives: the video's 10M model to its end, GPT-2's sizes, several cells on one GPU, ZeRO over NCCL with one rank.
#
#   launch/gpu_study.sh [--small] [--out DIR] [--nanogpt CHECKOUT] [STAGE ...]
#
# Stages, in order: baseline gpt2_124m chunked_loss sharing gpt2_350m deepspeed gpt2_774m gpt2_1558m (all, where none is named).
# Every row is a command of its own of under nine minutes and is saved at once to DIR/rows.jsonl, so the script may be stopped
# anywhere and started again: what is there is not done twice; a row that failed is tried again. --small runs the same
# commands on a CPU at a size of seconds.
set -uo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-.venv/bin/python}
OUT=runs/gpu_study SMALL="" NANOGPT="" STAGES=()
while (($#)); do
  case $1 in
    --small) SMALL=yes ;;
    --out) OUT=$2 && shift ;;
    --nanogpt) NANOGPT=$2 && shift ;;
    -*) echo "gpu_study.sh: $1, is not an option; see the first lines of this file" >&2 && exit 2 ;;
    *) STAGES+=("$1") ;;
  esac
  shift
done
ALL=(baseline gpt2_124m chunked_loss sharing gpt2_350m deepspeed gpt2_774m gpt2_1558m)
((${#STAGES[@]})) || STAGES=("${ALL[@]}")
for stage in "${STAGES[@]}"; do
  [[ " ${ALL[*]} " == *" $stage "* ]] || { echo "gpu_study.sh: $stage, is no stage; use ${ALL[*]}" >&2 && exit 2; }
done
mkdir -p "$OUT/done"
OUT=$(cd "$OUT" && pwd)
ROWS=$OUT/rows.jsonl FAILED=0
LIMIT=(timeout -k 10 -s TERM 520)
PY=$(realpath -s "$PY")
TENS=launch/experiments/baseline_10m.toml SIZES=launch/experiments/gpt2_sizes.toml

COMMON=() MICRO=(64 32 16 8) COMPILE=both BLOCKS=10 COUNTS=1,2,4,8 STEPS=()
if [[ $SMALL ]]; then # the same rows from a model of seconds
  COMMON=(--set engine.device='"cpu"' --set optim.global_batch_size=4 --set data.seq_len=16
    --set 'grid.sizes=[{n_layer=1,n_head=2,d_model=16}]')
  MICRO=(4) COMPILE=off BLOCKS=2 COUNTS=1,2 STEPS=(--set 'grid.steps=[30]' --set eval.every_tokens=1_000_000)
fi

# row KEY COMMAND...: run a command unless its row is there, and say how long it took
row() {
  local key=$1 started=$SECONDS
  shift
  [[ -e $OUT/done/$key ]] && echo "== $key: there already" && return
  echo "== $key"
  if "$@"; then touch "$OUT/done/$key"; else echo "== $key: failed" && FAILED=1; fi
  echo "== $key: $((SECONDS - started)) s"
}

data() { [[ -e data/$1/manifest.json ]] || "$PY" -m data_prep prepare "$1" --dir "data/$1" || exit 1; }

# bench KEY FILE ARGUMENTS...: a row of `harness bench`
bench() {
  local key=$1 file=$2
  shift 2
  row "$key" "${LIMIT[@]}" "$PY" -m harness bench "$file" "${COMMON[@]}" --blocks "$BLOCKS" --threads 1 --json "$ROWS" "$@"
}

train_baseline() {
  "${LIMIT[@]}" "$PY" -m launch submit $TENS --cluster alone --runs-dir "$OUT" "${COMMON[@]}" "${STEPS[@]}" || return 1
  "$PY" -m results baseline "$OUT/baseline_10m" | tee "$OUT/baseline.txt"
  grep -q "at the end" "$OUT/baseline.txt" # else it was stopped: the next call goes on
}

# nanogpt MICRO_BATCH: train.py compiled under the same torch, on the same tokens, the median of its own log
nanogpt() {
  local folder=$OUT/nanogpt
  [[ -d $folder ]] || "$PY" -c "import sys; from pathlib import Path; from harness.bench_trainer import copy_nanogpt
copy_nanogpt(Path(sys.argv[1]), Path(sys.argv[2]), Path('data/shakespeare-gpt2'))" "$NANOGPT" "$folder" || return 1
  (cd "$folder" && "${LIMIT[@]}" "$PY" train.py --dataset=bench --compile=True --eval_iters=1 --eval_interval=1000000 --log_interval=1 \
    --gradient_accumulation_steps=1 --batch_size="$1" --max_iters=60) | tee "$OUT/nanogpt.log" | tail -n 3
  "$PY" -c "import json, statistics, sys; from harness.bench_trainer import ITERATION
ms = [float(found[1]) for found in ITERATION.findall(open(sys.argv[1]).read())][20:]
print(json.dumps({'engine': 'nanogpt train.py', 'compile': True, 'micro_batch_size': int(sys.argv[2]),
    'tokens_per_s': int(sys.argv[2]) * 1024e3 / statistics.median(ms), 'n_steps': len(ms)}))" "$OUT/nanogpt.log" "$1" >>"$ROWS"
}

# gpt2 NAME SIZE: a size at every micro-batch, eager and compiled, and where the time of its step goes
gpt2() {
  local size=(--size "$2")
  [[ $SMALL ]] && size=()
  data shakespeare-gpt2
  for micro in "${MICRO[@]}"; do bench "$1-$micro" $SIZES "${size[@]}" --compile $COMPILE --micro-batches "$micro"; done
  bench "$1-profile" $SIZES "${size[@]}" --micro-batches "${MICRO[-1]}" --profile
}

# chunked_loss: peak memory of the loss at GPT-2's vocabulary, in chunks and with all logits held
chunked_loss() {
  "${LIMIT[@]}" "$PY" -c "import json, sys, torch; from harness.bench_loss import measure_loss
device = torch.device('cuda' if torch.cuda.is_available() and not sys.argv[2] else 'cpu')
for row in measure_loss(int(sys.argv[1]), 768, 50257, device): print(json.dumps(row))" "$1" "$SMALL" | tee -a "$ROWS"
}

for stage in "${STAGES[@]}"; do
  case $stage in
    baseline) data shakespeare-char && row baseline train_baseline ;;
    gpt2_124m)
      gpt2 gpt2_124m l12-h12-d768
      [[ $NANOGPT ]] && for micro in 12 "${MICRO[@]}"; do row "nanogpt-$micro" nanogpt "$micro"; done
      ;;
    chunked_loss) row chunked_loss chunked_loss "$([[ $SMALL ]] && echo 256 || echo 16384)" ;;
    sharing)
      data shakespeare-char
      bench sharing $TENS --share $COUNTS
      bench sharing-profile $TENS --profile
      ;;
    gpt2_350m) gpt2 gpt2_350m l24-h16-d1024 ;;
    deepspeed)
      data shakespeare-char
      for engine in torch zero1 zero3; do bench "deepspeed-$engine" $TENS --engines $engine; done
      ;;
    gpt2_774m) gpt2 gpt2_774m l36-h20-d1280 ;;
    gpt2_1558m) gpt2 gpt2_1558m l48-h25-d1600 ;;
  esac
done
echo "rows: $ROWS"
exit $FAILED
