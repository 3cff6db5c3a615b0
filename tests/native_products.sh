#!/usr/bin/env bash
# Compiles native_products.cpp in a folder and runs it at every level: as it is, and with the
# sanitizers of addresses and of undefined behaviour. Takes some minutes; CXX names the compiler.
set -euo pipefail
folder=$1
here=$(cd "$(dirname "$0")" && pwd)
native=$here/../jaxquant/packing/ops/native

declare -A flags=([avx512]="" [avx2]="" [plain]="" [product]="")
if [ "$(uname -m)" = x86_64 ]; then
    flags[avx512]="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx2 -mfma -mf16c"
    flags[avx2]="-mavx2 -mfma -mf16c"
fi

check() {
    local name=$1
    shift
    local common=(-std=c++17 -g0 -w "$@") jobs=()
    for file in "${!flags[@]}"; do
        # shellcheck disable=SC2086
        "${CXX:-g++}" "${common[@]}" ${flags[$file]} -c "$native/$file.cpp" -o "$folder/$file.o" &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job"; done
    "${CXX:-g++}" "${common[@]}" -pthread "$here/native_products.cpp" "$folder"/*.o -o "$folder/$name"
    for level in avx512 avx2 plain; do "$folder/$name" "$level"; done
}

check as_installed -O2
check sanitized -O0 -fsanitize=address,undefined -fno-sanitize-recover=all
