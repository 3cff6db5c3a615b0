#!/usr/bin/env bash
# Compiles native_products.cpp and native_clusters.cpp in a folder, with the sanitizers of addresses
# and of undefined behaviour, and runs them, products at every level. Takes a minute; CXX names the
# compiler.
set -euo pipefail
folder=$1
here=$(cd "$(dirname "$0")" && pwd)
native=$here/../jaxquant/cpp

declare -A flags=([avx512]="" [avx2]="" [plain]="" [product]="" [pool]="" [clusters]="")
if [ "$(uname -m)" = x86_64 ]; then
    flags[avx512]="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx2 -mfma -mf16c"
    flags[avx2]="-mavx2 -mfma -mf16c"
fi

common=(-std=c++17 -O0 -g0 -w -fsanitize=address,undefined -fno-sanitize-recover=all)
jobs=()
for file in "${!flags[@]}"; do
    # shellcheck disable=SC2086
    "${CXX:-g++}" "${common[@]}" ${flags[$file]} -c "$native/$file.cpp" -o "$folder/$file.o" &
    jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done
for program in products clusters; do
    "${CXX:-g++}" "${common[@]}" -pthread "$here/native_$program.cpp" "$folder"/*.o -o "$folder/$program"
done
for level in avx512 avx2 plain; do "$folder/products" "$level"; done
"$folder/clusters"
