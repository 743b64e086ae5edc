#!/usr/bin/env bash
# The KALLM experiment, unattended: seven arms, three seeds, one table (docs/kallm.md).
# The same command continues what was interrupted.
#
#   launchers/kallm.sh                                   # SmolLM2-135M, smol-smoltalk and BBH of the hub
#   CHAT='chat/train.jsonl' CHAT_VAL='chat/test.jsonl' BENCHMARKS=benchmarks launchers/kallm.sh
#   PRETRAIN='texts/*.jsonl' PRETRAIN_VAL=val.jsonl ... launchers/kallm.sh     # first a base of that shape
#
# Further words are overrides of all arms: launchers/kallm.sh steps=1000 price=h100
set -euo pipefail
: "${BASE:=HuggingFaceTB/SmolLM2-135M}"  # folder or hub name; PRETRAIN makes one instead
: "${RUNS:=runs}"                        # results lie in RUNS/kallm
: "${SEEDS:=0 1 2}"                      # one process each, side by side
: "${ARMS:=finetuned,restart,matched,kan,kan_parallel,kan_sequence}"
: "${SHAPE:=smollm2_135m}"               # of conf/scratch: what PRETRAIN trains
: "${PRETRAIN_STEPS:=600}"
: "${PRETRAIN_OPTIONS:=engine.compile=true}"  # overrides of that run
: "${GPUS:=}"                            # "0 1 2 3": the arms' processes take turns on them
: "${KALMAGROVE:=kalmagrove}"

list() { printf '[%s]' "$(printf '%s,' $1 | sed 's/,$//')"; }  # "a b" or a glob -> [a,b]

if [ -n "${PRETRAIN:-}" ]; then
  $KALMAGROVE retrofit arm=pretrain scratch="$SHAPE" name=kallm-base dir="$RUNS" \
    data=jsonl data.name=pretrain "data.source.paths=$(list "$PRETRAIN")" \
    ${PRETRAIN_VAL:+"data.source.val_paths=$(list "$PRETRAIN_VAL")"} \
    data.tokenizer.kind=bpe data.tokenizer.name=null data.seq_len=1024 \
    batch.tokens=131072 batch.micro=32 steps="$PRETRAIN_STEPS" \
    optim.lr=3e-3 optim.weight_decay=0.1 schedule.warmup=50 eval.every=300 checkpoint.every=300 \
    $PRETRAIN_OPTIONS
  BASE=$RUNS/kallm-base/model
fi

data=(data=smol_smoltalk)
if [ -n "${CHAT:-}" ]; then
  data=(data=jsonl data.name=chat data.format=messages data.source.key=messages
        "data.source.paths=$(list "$CHAT")")
  [ -z "${CHAT_VAL:-}" ] || data+=("data.source.val_paths=$(list "$CHAT_VAL")")
fi
common=(experiment=kallm base="$BASE" dir="$RUNS" "${data[@]}" "$@")
[ -z "${BENCHMARKS:-}" ] || common+=(evaluation.files="$BENCHMARKS")

mkdir -p "$RUNS/kallm"
gpus=($GPUS)
start() { # NAME WORD...: one process, in the background
  local own=()
  [ -z "$GPUS" ] || own=(CUDA_VISIBLE_DEVICES="${gpus[${#jobs[@]} % ${#gpus[@]}]}")
  env "${own[@]}" $KALMAGROVE retrofit "${@:2}" track=quiet "${common[@]}" >"$RUNS/kallm/$1.log" 2>&1 &
  jobs+=($!)
}
jobs=()
start untouched arm=untouched
for seed in $SEEDS; do start "seed$seed" -m arm="$ARMS" seed="$seed"; done
failed=0
for job in "${jobs[@]}"; do wait "$job" || failed=$?; done
if [ "$failed" != 0 ]; then
  for log in "$RUNS"/kallm/*.log; do echo "== $log"; tail -n 3 "$log"; done >&2
  exit "$failed"
fi
for suite in bbh bbh_generate; do
  [ ! -d "$RUNS/kallm/untouched/evaluation/$suite" ] ||
    $KALMAGROVE compare "$RUNS/kallm" --suite $suite --reference restart --pair kan:matched --pair kan:finetuned
done
