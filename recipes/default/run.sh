#!/usr/bin/env bash
# Make weights/default from nothing but the recordings, the text and the published Whisper tiny.en
# encoder. Every step resumes where a killed run stopped.
#
#   recipes/default/run.sh DATA WORK
#
# DATA holds manifests/, audio/, noise/, text/ and whisper-tiny.en/; WORK takes a few gigabytes.
# Needs espeak-ng, flite and festival for the synthetic speech, and `speechllm` on the PATH.
set -euo pipefail

data=$(realpath "${1:?usage: run.sh DATA WORK}")
work=${2:?usage: run.sh DATA WORK}
here=$(dirname "$(realpath "$0")")
jobs=$(nproc)
mkdir -p "$work"

python "$here/synthesise.py" --text-dir "$data/text" --manifests "$data/manifests" \
    --output "$work/synthetic" --jobs "$jobs"
python "$here/prepare.py" --data-dir "$data" --synthetic "$work/synthetic" --output "$work/prepared"
prepared=$work/prepared

speechllm train tokenizer --text "$prepared/lm_text.txt" --vocab-size 2048 \
    --output "$work/tokenizer"

# Whisper in every tensor, decoder vocabulary replaced, CTC beside it: 35 h of audio seen.
# The human recordings count three times.
speechllm train whisper --manifest "$prepared/train.jsonl" \
    --manifest "$prepared/train_human.jsonl" --manifest "$prepared/train_human.jsonl" \
    --dev "$prepared/dev.jsonl" --whisper "$data/whisper-tiny.en" \
    --tokenizer "$work/tokenizer" --encoder-mode trimmed --ctc-weight 0.4 \
    --augment --spec-augment --noise-dir "$prepared/noise_train" --concatenation 0.2 \
    --epochs 2 --learning-rate 3e-4 --warmup-steps 200 --max-batch-audio-s 40 \
    --output "$work/whisper"

# A Qwen2 from random weights: it learns the language, and to read tokens spread over time.
speechllm train lm --text "$prepared/lm_text.txt" --dev-text "$prepared/dev.jsonl" \
    --tokenizer "$work/tokenizer" --epochs 1 --learning-rate 1e-3 --batch-tokens 1200 \
    --output "$work/lm"

# Connector and LM learn from cached encoder outputs …
speechllm cache --manifest "$prepared/train.jsonl" --encoder "$work/whisper" --llm "$work/lm" \
    --augmented-copies 1 --noise-dir "$prepared/noise_train" --output "$work/cache"
speechllm train connector --cache "$work/cache" --dev "$prepared/dev.jsonl" \
    --encoder "$work/whisper" --llm "$work/lm" --ctc fused --prompt "" \
    --language en --language mn --stack-size 5 --connector-hidden-size 512 \
    --train-llm --llm-lr-scale 1.0 --epochs 2 --learning-rate 5e-4 --warmup-steps 100 \
    --max-batch-audio-s 80 --concatenation 0.2 --stored-dtype fp16 --output "$work/connector"
