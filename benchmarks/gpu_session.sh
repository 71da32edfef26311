#!/usr/bin/env bash
# shellcheck disable=SC2329 # sections are called by their names
# Every figure that needs a GPU, in one run of at most eight minutes on one H100 or H200: no weights,
# no network. Sections run in order of importance. Each has a time limit and writes its files as soon
# as it ends; interrupted or failed ones are listed as not measured in the table at the end, and the
# exit code is then 1.
#
#   bash benchmarks/gpu_session.sh
#   SECTIONS="headline gpu_tests" REFERENCE=../before REFERENCE_COMMIT=7918d52 bash benchmarks/gpu_session.sh
#   DRY_RUN=1 bash benchmarks/gpu_session.sh        # every section at a tiny size on the CPU
#
# Paths are relative to the checkout.
# RESULTS           output folder, emptied first (default: outputs/gpu_session)
# OUT               folder for the table, the profiles and an archive of all files; optional
# REFERENCE         checkout of another commit, to be timed in turns with this one; optional, made by
#                   git archive 7918d52 flashdreams kernels benchmarks \
#                       ':!flashdreams/integrations/toy_world/weights' | tar x -C REFERENCE
# COMMIT            commit of this tree, if it has no .git
# SECTIONS          which ones to run
# TOTAL_S           time limit of the whole run, in seconds
#
# A machine without network needs these in addition to torch, triton, transformers, pyyaml, jinja2, matplotlib and
# pytest: tyro (docstring-parser, typeguard), mediapy (ipython and what it needs), imageio-ffmpeg,
# fa3-fwd (attention of the headline), diffusers (importlib-metadata, zipp; for peers), and, if
# available, pytest-timeout and pytest-xdist.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

ALL="headline gpu_tests lingbot decoders attention kernels strict precision growth peers tiles"
SECTIONS="${SECTIONS:-$ALL}"
RESULTS="${RESULTS:-outputs/gpu_session}"
OUT="${OUT:-}"
REFERENCE="${REFERENCE:-}"
REFERENCE_COMMIT="${REFERENCE_COMMIT:-unknown}"
COMMIT="${COMMIT:-}"
DRY_RUN="${DRY_RUN:-}"
TOTAL_S="${TOTAL_S:-480}"
PYTHON="${PYTHON:-python3}"
export RESULTS REFERENCE REFERENCE_COMMIT COMMIT DRY_RUN PYTHON
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

COMMON=()
[[ -n "$COMMIT" ]] && COMMON=(--git-commit "$COMMIT")
[[ -n "$DRY_RUN" ]] && COMMON+=(--device cpu)
AGAINST=()
[[ -n "$REFERENCE" ]] && AGAINST=(--reference "$REFERENCE" --reference-commit "$REFERENCE_COMMIT")

# Selects the arguments for a CPU (small) or for a GPU.
sized() { # TINY... -- LARGE...
    local tiny=()
    while [[ "$1" != -- ]]; do
        tiny+=("$1")
        shift
    done
    shift
    if [[ -n "$DRY_RUN" ]]; then printf '%s\n' "${tiny[@]}"; else printf '%s\n' "$@"; fi
}

bench() { # SCRIPT ARGUMENTS...; the report is named after the section
    local script="$1"
    shift
    "$PYTHON" "benchmarks/$script.py" "$@" "${COMMON[@]}" --json "$RESULTS/$section.json"
}

variants() { # NAMES SECONDS ARGUMENTS...
    local names="$1" seconds="$2"
    shift 2
    bench variants "$@" --variants "$names" --seconds "$seconds" "${AGAINST[@]}" \
        --profile "$RESULTS/profile_$section.txt"
}

headline() {
    mapfile -t size < <(sized self-forcing-tiny-random --repeats 2 --steps 1 -- \
        self-forcing-wan2.1-t2v-1.3b-taehv --repeats "${REPEATS:-6}" --steps 4)
    variants "${HEADLINE:-default; reference; fp8; fp8_gemm; fp8_gemm, all widths; reference, all flags; graphs off}" 165 "${size[@]}"
}

gpu_tests() {
    local workers=()
    "$PYTHON" -c "import xdist" 2>/dev/null && workers=(-n 3 --dist loadfile)
    "$PYTHON" -c "import pytest_timeout" 2>/dev/null && workers+=(--timeout 120)
    read -ra chosen <<<"${GPU_TESTS:-tests/gpu tests/unit/runtime}"
    "$PYTHON" -m pytest "${chosen[@]}" -m gpu -v -p no:cacheprovider \
        --durations 10 "${workers[@]}"
}

lingbot() {
    if [[ -z "$DRY_RUN" ]] && (( $(memory_gib) < 70 )); then
        echo "LingBot-World 14B needs some 64 GiB; this card has $(memory_gib) GiB."
        return 3
    fi
    mapfile -t size < <(sized lingbot-world-tiny-random --repeats 1 --steps 1 -- \
        lingbot-world-fast-taehv-window15-sink3 --repeats "${REPEATS:-3}" --steps 2)
    variants "${LINGBOT:-default; fp8_gemm; fp8}" 170 "${size[@]}" --one-at-a-time
}

decoders() {
    mapfile -t size < <(sized --dim 8 --taehv-width 8 --latent-height 4 --latent-width 4 \
        --repeats 2 -- --dim 96 --taehv-width 64 --latent-height 60 --latent-width 104 \
        --dtype bfloat16 --repeats 10)
    bench decode "${size[@]}"
}

attention() {
    mapfile -t size < <(sized --preset tiny --repeats 1 -- --preset wan-1.3b --repeats 20)
    bench attention "${size[@]}"
}

kernels() {
    mapfile -t size < <(sized --preset tiny --repeats 1 -- --preset wan-1.3b --repeats 100)
    bench kernels "${size[@]}"
}

strict() {
    mapfile -t size < <(sized self-forcing-tiny-random --repeats 1 --steps 1 -- \
        self-forcing-wan2.1-t2v-1.3b-taehv --repeats 4 --steps 2)
    variants "default; strict" 65 "${size[@]}"
}

precision() {
    mapfile -t size < <(sized self-forcing-tiny-random --repeats 2 -- \
        toy-world self-forcing-tiny-random --repeats 10 --walks 2 --seconds 5)
    bench precision "${size[@]}"
}

growth() {
    mapfile -t size < <(sized --repeats 20 -- --repeats 300)
    bench growth toy-world "${size[@]}"
}

peers() {
    mapfile -t size < <(sized --preset tiny --repeats 1 -- --preset wan-1.3b --repeats 2)
    bench peers "${size[@]}"
}

tiles() {
    mapfile -t size < <(sized --preset tiny --repeats 1 -- --preset wan-1.3b --repeats 10)
    bench tiles "${size[@]}"
}

memory_gib() {
    nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | awk '{print int($1/1024); exit}'
}

limit_of() { # seconds of a section
    case "$1" in
        headline) echo 180 ;;
        gpu_tests) echo 110 ;;
        lingbot) echo 180 ;;
        strict) echo 75 ;;
        precision | peers) echo 60 ;;
        tiles) echo 100 ;;
        decoders) echo 50 ;;
        *) echo 40 ;;
    esac
}

note() { # SECTION STATE SECONDS
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$RESULTS/sections.tsv"
}

pack() {
    [[ -z "$OUT" ]] && return
    mkdir -p "$OUT"
    tar czf "$OUT/session.tar.gz.part" -C "$RESULTS" . && mv "$OUT/session.tar.gz.part" "$OUT/session.tar.gz"
    cp "$RESULTS"/profile_*.txt "$RESULTS/headline.json" "$RESULTS/summary.md" "$OUT" 2>/dev/null
    return 0
}

# Runs one section in a separate process, so that `timeout` can end it with all its children.
if [[ "${1:-}" == --section ]]; then
    section="$2"
    "$section"
    exit
fi

for section in $SECTIONS; do
    if [[ " $ALL " != *" $section "* ]]; then
        echo "unknown section $section; there are: $ALL" >&2
        exit 2
    fi
done
mkdir -p "$RESULTS"
rm -f "$RESULTS"/*
# Slugs are found through the entry points of an installed package; a plain tree needs extra ones.
if ! "$PYTHON" -c "from importlib.metadata import distribution; distribution('flashdreams')" 2>/dev/null; then
    site="$(realpath "$RESULTS")-site"
    "$PYTHON" benchmarks/announce.py "$site" && PYTHONPATH="$PYTHONPATH:$site"
fi
begin=$SECONDS
missing=0
for section in $ALL; do
    [[ " $SECTIONS " == *" $section "* ]] || note "$section" "not asked for" 0
done
for section in $SECTIONS; do
    left=$((TOTAL_S - SECONDS + begin))
    limit=$(limit_of "$section")
    ((limit > left)) && limit=$left
    if ((limit < 10)); then
        note "$section" "not measured: no time was left" 0
        missing=1
        continue
    fi
    echo "== $section, at most $limit s"
    at=$SECONDS
    timeout --kill-after 5 "$limit" bash benchmarks/gpu_session.sh --section "$section" 2>&1 | tee "$RESULTS/$section.log"
    code=${PIPESTATUS[0]}
    case "$code" in
        0) state="done" ;;
        3) state="not measured: $(tail -n 1 "$RESULTS/$section.log")" ;;
        124 | 137) state="cut after $limit s" ;;
        *) state="failed: $(tail -n 1 "$RESULTS/$section.log" | cut -c 1-200)" ;;
    esac
    [[ "$state" != "done" ]] && missing=1
    note "$section" "$state" $((SECONDS - at))
    pack
done
echo "== table"
"$PYTHON" benchmarks/session_table.py "$RESULTS" | tee "$RESULTS/summary.md"
pack
exit $missing
