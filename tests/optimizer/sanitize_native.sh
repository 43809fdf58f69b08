#!/bin/sh
# The native step's own tests with the loop compiled under sanitizers.
#
#   tests/optimizer/sanitize_native.sh address     AddressSanitizer and UndefinedBehaviorSanitizer; g++
#   tests/optimizer/sanitize_native.sh thread      ThreadSanitizer; clang++ with libomp and its archer, which tells it
#                                                  what OpenMP's barriers order (Debian: clang-16 libomp-16-dev)
#
# PYTHON names the interpreter. Everything but the tests that build the library is run; a finding ends the process.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export ADAM_MINI_CACHE="$scratch"
case ${1:-address} in
address)
  export CXX="${CXX:-g++}" ADAM_MINI_CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
  preload="$($CXX -print-file-name=libasan.so) $($CXX -print-file-name=libubsan.so) $($CXX -print-file-name=libstdc++.so)"
  export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
  ;;
thread)
  export CXX="${CXX:-clang++-16}" ADAM_MINI_CXXFLAGS="-O1 -g -fsanitize=thread -shared-libsan"
  preload=$($CXX -print-file-name=libclang_rt.tsan-x86_64.so)
  [ -e "$preload" ] || preload=$($CXX -print-runtime-dir)/libclang_rt.tsan-x86_64.so
  export TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1" OMP_TOOL_LIBRARIES=$($CXX -print-resource-dir)/../../libarcher.so ARCHER_OPTIONS=verbose=1
  ;;
*)
  echo "usage: $0 address|thread" >&2
  exit 2
  ;;
esac
# Built first: a compiler under the preloaded library would be slow, and its leaks are its own affair. The compiler's name
# is part of the library's key, so it must be the one that the tests will ask for.
"$python" -c "from optimizer.step.engines.native import library as l; from pathlib import Path; \
import os; print(l._built(Path('$scratch'), os.environ['CXX']))"
LD_PRELOAD="$preload" "$python" -m pytest -p no:cacheprovider -x -q -s \
  tests/optimizer/test_native.py tests/optimizer/test_native_strides.py tests/optimizer/test_native_low_bit.py \
  tests/optimizer/test_native_factored.py tests/optimizer/test_native_ways.py \
  -k "not cache and not compiler and not processes and not fifty and not whole_models"
