#!/usr/bin/env bash
# shellcheck disable=SC2329 # sections are called by their names
# Every figure that needs a GPU, in two runs on one H100 or H200, without weights and network: the
# first decides about defaults, in seven minutes; the second checks what is there, in six.
#
#   bash benchmarks/gpu_session.sh decide
#   bash benchmarks/gpu_session.sh check
#   DRY_RUN=1 bash benchmarks/gpu_session.sh        # every section at a tiny size on the CPU
#
# Sections run in order of importance. Each has a time limit and writes its files as soon as it
# ends; interrupted or failed ones are listed as not measured in the table at the end, and the exit
# code is then 1. What each figure decides is in results/NOTES.md.
#
# Before, where there is a network: wheels (34 MB) for the Python of the GPU machine, and the
# reference. The machine has torch, triton, transformers, safetensors, pyyaml, jinja2, matplotlib,
# pytest, pytest-timeout and pytest-xdist; the section peers needs accelerate and diffusers.
#
#   pip download --no-deps --only-binary :all: --python-version 3.12 --abi cp312 --abi abi3 \
#       --abi none --platform manylinux_2_24_x86_64 --platform manylinux_2_28_x86_64 \
#       --platform any -d .whl tyro docstring-parser typeguard psutil fa3-fwd diffusers
#   mkdir .ref; git archive 7918d52 flashdreams kernels benchmarks \
#       ':!flashdreams/integrations/toy_world/weights' | tar x -C .ref; git rev-parse HEAD
#
# On the GPU machine, in this tree with both folders. The second run follows at once on the same
# machine, whose disk cache and compiled kernels it needs to be in time.
#
#   python3 -m pip install -q --no-index --no-deps --target .site .whl/*.whl
#   export PYTHONPATH=$PWD/.site COMMIT=SHA REFERENCE=.ref REFERENCE_COMMIT=7918d52
#   OUT=out/decide bash benchmarks/gpu_session.sh decide
#   OUT=out/check bash benchmarks/gpu_session.sh check
#
# Paths are relative to the checkout.
# RESULTS           output folder, emptied first (default: outputs/gpu_session)
# OUT               folder for the table, the profiles and an archive of all files; optional
# REFERENCE         checkout of another commit, to be timed in turns with this one; optional
# COMMIT            commit of this tree, if it has no .git
# SECTIONS          which ones to run; HEADLINE and LINGBOT: which variants (see variants.py)
# TOTAL_S           time limit of the whole run, in seconds
set -uo pipefail
cd "$(dirname "$0")/.." || exit

DECIDE="headline lingbot decoders kernels"
CHECK="gpu_tests precision strict tiles peers growth"
ALL="$DECIDE $CHECK"
case "${1:-}" in
    decide) SECTIONS="${SECTIONS:-$DECIDE}" TOTAL_S="${TOTAL_S:-420}" ;;
    check) SECTIONS="${SECTIONS:-$CHECK}" TOTAL_S="${TOTAL_S:-360}" ;;
    "" | --section) SECTIONS="${SECTIONS:-$ALL}" TOTAL_S="${TOTAL_S:-780}" ;;
    *)
        echo "unknown run $1; there are: decide, check; without a name, all sections" >&2
        exit 2
        ;;
esac
RESULTS="${RESULTS:-outputs/gpu_session}"
OUT="${OUT:-}"
REFERENCE="${REFERENCE:-}"
REFERENCE_COMMIT="${REFERENCE_COMMIT:-unknown}"
COMMIT="${COMMIT:-}"
DRY_RUN="${DRY_RUN:-}"
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

variants() { # NAMES SECONDS ARGUMENTS...; fewer seconds if less than that is left, to have rows
    local names="$1" seconds="$2" allowed=$((${LIMIT:-999} - 10))
    shift 2
    ((seconds > allowed)) && seconds=$allowed
    bench variants "$@" --variants "$names" --seconds "$seconds" "${AGAINST[@]}" \
        --profile "$RESULTS/profile_$section.txt"
}

headline() {
    mapfile -t size < <(sized self-forcing-tiny-random --repeats 2 --steps 1 -- \
        self-forcing-wan2.1-t2v-1.3b-taehv --repeats "${REPEATS:-4}" --steps 4)
    variants "${HEADLINE:-default; fp8; fp8_gemm; fp8_gemm, all widths; reference}" 125 "${size[@]}"
}

gpu_tests() {
    local workers=() chosen
    "$PYTHON" -c "import xdist" 2>/dev/null && workers=(-n 4 --dist loadfile)
    "$PYTHON" -c "import pytest_timeout" 2>/dev/null && workers+=(--timeout 120)
    mapfile -t chosen < <(grep -rl 'mark\.gpu' tests --include 'test_*.py' | sort)
    "$PYTHON" -m pytest "${chosen[@]}" tests/kernels/test_{channels,fp8_rows,adaln}.py -m gpu -v \
        -p no:cacheprovider --continue-on-collection-errors --durations 10 "${workers[@]}"
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
        --repeats 2 --variants "fast; fast, graph; fast, pairs of frames" -- --dim 96 \
        --taehv-width 64 --latent-height 60 --latent-width 104 --dtype bfloat16 --repeats 10)
    bench decode "${size[@]}"
}

kernels() {
    mapfile -t size < <(sized --preset tiny --repeats 1 -- --preset wan-1.3b --repeats 100)
    bench kernels "${size[@]}"
}

strict() {
    mapfile -t size < <(sized self-forcing-tiny-random --repeats 1 --steps 1 -- \
        self-forcing-wan2.1-t2v-1.3b-taehv --repeats 4 --steps 2)
    variants "default; graphs off; strict" 65 "${size[@]}"
}

precision() {
    mapfile -t size < <(sized self-forcing-tiny-random --repeats 2 --steps 3 \
        --walks 1 --seconds 1 -- toy-world self-forcing-tiny-random --repeats 10 --walks 2 --seconds 5)
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
        headline) echo 140 ;;
        lingbot) echo 180 ;;
        gpu_tests) echo 120 ;;
        strict) echo 75 ;;
        precision | peers | tiles) echo 60 ;;
        *) echo 50 ;;
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
    LIMIT=$limit timeout --kill-after 5 "$limit" bash benchmarks/gpu_session.sh --section "$section" 2>&1 | tee "$RESULTS/$section.log"
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
