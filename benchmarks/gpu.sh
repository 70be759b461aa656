#!/bin/bash
# Measures everything that wants a GPU, in one call and at most 25 minutes, into one JSON file.
#
#   benchmarks/gpu.sh runs/gpu [DATA]
#
# DATA is a folder with `camvid` and `idd_lite`; without it nothing is trained. Each part has its
# own limit and writes its own file at once: a part that fails or takes too long is recorded and
# ends nothing else. Parts that no time is left for are recorded as skipped. The last line names the
# file; `python -m benchmarks.collect runs/gpu` prints its tables for docs/performance.md.
# PYTHON chooses the interpreter, BUDGET the seconds for all parts, LIMIT the most for one of them.
set -u
out=${1:?usage: benchmarks/gpu.sh OUTPUT [DATA]}
data=${2:-}
python=${PYTHON:-python}
budget=${BUDGET:-1500}
longest=${LIMIT:-$budget}
mkdir -p "$out/parts"
# The folder's own results, not those of an earlier call.
rm -f "$out"/parts/*.json "$out"/parts/*.status "$out"/parts/*.log

# part NAME LIMIT COMMAND...: runs a command for LIMIT seconds at most, and notes how it ended.
part() {
  local name=$1 limit=$2 left=$((budget - SECONDS)) begin=$SECONDS status
  shift 2
  if ((left < 20)); then
    echo "skipped 0" > "$out/parts/$name.status"
    return
  fi
  ((limit > left)) && limit=$left
  ((limit > longest)) && limit=$longest
  echo "[$SECONDS s] $name, at most $limit s"
  timeout --signal=TERM --kill-after=20 "$limit" "$@" > "$out/parts/$name.log" 2>&1
  status=$?
  echo "$status $((SECONDS - begin))" > "$out/parts/$name.status"
}

# race NAME LIMIT FLAGS...: a part that is a run of `python -m benchmarks`.
race() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" -m benchmarks --json="$out/parts/$name.json" "$@"
}

half=(--dtype=bfloat16 --torch_dtype=bfloat16)
race afformer_base_1 150 --model=afformer_base --compile --calls=10
race afformer_base_1_bf16 150 --model=afformer_base --compile --calls=10 "${half[@]}"
race afformer_base_32_bf16 180 --model=afformer_base --compile --batch=32 "${half[@]}"
race train_16_bf16 200 --train --model=afformer_base --compile --batch=16 --size=512x512 "${half[@]}"
race proscale 150 --model=proscale_swin_tiny --against=mask2former_swin_tiny --size=800x1088 \
  --num_classes=133 --calls=5 --rounds=8
race proscale_bf16 150 --model=proscale_swin_tiny --against=mask2former_swin_tiny --size=800x1088 \
  --num_classes=133 --calls=5 --rounds=8 "${half[@]}"
race avesformer 120 --model=avesformer_lite --against=avesformer_r50 --size=224x224 --num_classes=1 \
  --calls=10
race avesformer_40 120 --model=avesformer_lite --size=224x224 --num_classes=1 --batch=40 --calls=10
if [[ -n $data ]]; then
  # IDD-Lite from scratch, then CamVid from its weights; either can be resumed with its command.
  part idd 300 "$python" -m effseg_jax train --config=afformer/folder:tiny --workdir="$out/idd" \
    --config.data.root="$data/idd_lite" --config.data.augment.scale='(320,227)' \
    --config.data.augment.ratio='(0.75,2.25)' --config.data.augment.crop='(224,224)' \
    --config.train.batch_size=16 --config.train.num_steps=6000 \
    --config.optimizer.learning_rate=1.5e-3 --config.optimizer.weight_decay=0.02 \
    --config.eval.scale='(480,341)' --config.eval.multiple=1 --config.data.num_workers=8
  part camvid 300 "$python" -m effseg_jax train --config=afformer/camvid:tiny \
    --workdir="$out/camvid" --config.data.root="$data/camvid" --config.init_from="$out/idd" \
    --config.train.batch_size=16 --config.train.num_steps=4000 --config.data.num_workers=8
fi
"$python" -m benchmarks.collect "$out"
