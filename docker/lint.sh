#!/usr/bin/env bash
# What can be known of docker/ without building or running it. Argument: the folder of the tools.
set -euo pipefail
bin=$(realpath "${1:-.venv/bin}")
cd "$(dirname "$0")"
"$bin/hadolint" ./*.Dockerfile
# Secrets must be set; what they are does not matter here.
export POSTGRES_PASSWORD=x S3_ACCESS_KEY=x S3_SECRET_KEY=x
# `podman-compose config` runs no podman, but asks for its version first.
aside=$(mktemp -d)
trap 'rm -rf "$aside"' EXIT
printf '#!/bin/sh\necho "podman version 5.0.0"\n' >"$aside/podman"
chmod +x "$aside/podman"
for files in "-f compose.yaml" "-f compose.yaml -f compose.gpu.yaml" "--profile proxy -f compose.yaml"; do
    # shellcheck disable=SC2086
    PATH="$aside:$PATH" "$bin/podman-compose" $files config >/dev/null
done
# It knows names only, and jobs are named by the cluster.
for job in kubernetes/*/job.yaml; do
    sed 's/^  generateName: .*/  name: one/' "$job" >"$aside/$(basename "$(dirname "$job")").yaml"
done
sed 's/^metadata:/&\n  name: one/' ../eval_platform/launching/worker_job.yaml >"$aside/worker.yaml"
# The newest release that it knows, and the oldest whose schema lets a rule for failed pods name exit codes alone.
for version in "" "-k 1.29"; do
    # shellcheck disable=SC2086
    "$bin/kubernetes-validate" --strict $version kubernetes/{service-account,storage,launcher-role}.yaml "$aside"/*.yaml
done
