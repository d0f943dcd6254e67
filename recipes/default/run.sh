#!/usr/bin/env bash
# Make weights/default from nothing but the recordings, the text and the published Whisper tiny.en
# encoder. Every step resumes where a killed run stopped; the stages took about 90 minutes in all on two
# cores of a 2023 server CPU.
#
#   recipes/default/run.sh DATA WORK
#
# DATA holds manifests/, audio/, noise/, text/ and whisper-tiny.en/; WORK takes a few gigabytes.
# Needs Debian's espeak-ng and flite, and `speechllm` on the PATH.
set -euo pipefail

data=$(realpath "${1:?usage: run.sh DATA WORK}")
work=${2:?usage: run.sh DATA WORK}
here=$(dirname "$(realpath "$0")")
mkdir -p "$work"

python "$here/synthesise.py" --text-dir "$data/text" --manifests "$data/manifests" \
    --output "$work/synthetic" --jobs "$(nproc)"
python "$here/prepare.py" --data-dir "$data" --synthetic "$work/synthetic" --output "$work/prepared"
prepared=$work/prepared

speechllm train tokenizer --text "$prepared/lm_text.txt" --vocab-size 2048 \
    --output "$work/tokenizer"

# Whisper in every tensor, its decoder's vocabulary replaced, CTC beside it. The human recordings
# count three times.
speechllm train whisper --manifest "$prepared/train.jsonl" \
    --manifest "$prepared/train_human.jsonl" --manifest "$prepared/train_human.jsonl" \
    --dev "$prepared/dev.jsonl" --whisper "$data/whisper-tiny.en" \
    --tokenizer "$work/tokenizer" --encoder-mode trimmed --ctc-weight 0.4 \
    --augment --spec-augment --noise-dir "$prepared/noise_train" --concatenation 0.2 \
    --epochs 2 --learning-rate 3e-4 --warmup-steps 200 --max-batch-audio-s 40 \
    --output "$work/whisper"

# A Qwen2 from random weights learns the language, and to read tokens spread over time.
awk 'NR % 4 == 0' "$prepared/lm_text.txt" >"$work/lm_text_quarter.txt"
speechllm train lm --text "$work/lm_text_quarter.txt" --dev-text "$prepared/dev.jsonl" \
    --tokenizer "$work/tokenizer" --epochs 1 --learning-rate 1.5e-3 --warmup-steps 50 \
    --batch-tokens 400 --reading 0.9 --curriculum 0.9 --output "$work/lm"

# Connector, CTC head and LM learn from cached encoder outputs.
speechllm cache --manifest "$prepared/train.jsonl" --encoder "$work/whisper" --llm "$work/lm" \
    --output "$work/cache"
speechllm cache --manifest "$prepared/train_human.jsonl" --encoder "$work/whisper" \
    --llm "$work/lm" --plain-copies 0 --augmented-copies 2 \
    --noise-dir "$prepared/noise_train" --output "$work/cache_human"
speechllm train connector --cache "$work/cache" --cache "$work/cache_human" \
    --dev "$prepared/dev.jsonl" --encoder "$work/whisper" --llm "$work/lm" --ctc fused \
    --prompt "" --language en --language mn --stack-size 5 --connector-hidden-size 512 \
    --train-llm --llm-lr-scale 1.0 --epochs 1 --learning-rate 6e-4 --warmup-steps 50 \
    --max-batch-audio-s 40 --concatenation 0.1 --no-spec-augment --stored-dtype fp16 \
    --output "$work/connector"

# What the server loads: the product without the run's state.
product=$here/../../weights/default
mkdir -p "$product"
cp -r "$work"/connector/{config,generation_config,processor_config,tokenizer,tokenizer_config}.json \
    "$work"/connector/{connector.safetensors,chat_template.jinja,encoder,llm} "$product"

for split in kathleen common_voice_en_dev fsdd fsdd_strings jfk synthetic_mn non_speech; do
    speechllm evaluate --model "$product" --manifest "$prepared/test_$split.jsonl" --with-ctc \
        --output "$work/evaluation/$split"
    speechllm evaluate --model "$work/whisper" --manifest "$prepared/test_$split.jsonl" \
        --with-ctc --output "$work/evaluation-whisper/$split"
done
