#!/usr/bin/env bash
# Every kernel and architecture that is supported, in emulated machines: longer than `.ci/run`, for every night.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for arch in x86_64 aarch64; do
	for kernel in 6.1 6.12; do
		cargo xtask test-vm --arch "$arch" --kernel "$kernel" "$@"
		# What `.ci/run` tries on this machine only, since no kernel or processor should make a difference.
		cargo xtask test-vm --arch "$arch" --kernel "$kernel" --group pages "$@"
	done
done
