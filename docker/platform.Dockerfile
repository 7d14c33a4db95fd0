# Dagster's daemon, web server and code location, and the workers that the code location starts. CPU, unless TORCH_INDEX
# names an index of CUDA builds.
#
#     docker build -f docker/platform.Dockerfile -t eval-platform .
#
# TORCH_INDEX: URL of a package index for torch beside the usual one, which has what torch needs in the pinned versions; a
# build with a local suffix (+cpu, +cu128) goes before one without. An index of your own for everything else, with
# its credentials, comes as a build secret, so that no layer holds it: --secret id=pip.conf,src=$HOME/.config/pip/pip.conf
# EXTRAS: of pyproject.toml; Dagster's Helm chart needs kubernetes among them.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python -m venv /opt/venv \
    && /opt/venv/bin/pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} torch
ARG EXTRAS=metrics,postgres
COPY pyproject.toml README.md LICENSE ./
COPY eval_platform eval_platform
COPY assets assets
COPY resources resources
COPY sensors sensors
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/venv/bin/pip install -c constraints.txt ".[${EXTRAS}]"

FROM ${PYTHON_IMAGE}
# Programs that models write are run by bubblewrap.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /state platform \
    && install -d -o 10001 -g 10001 -m 1777 /config /state
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/state \
    EVAL_PLATFORM_CONFIG=/config/eval_platform.toml \
    EVAL_PLATFORM_STATE=/state \
    DAGSTER_HOME=/state/dagster \
    DAGSTER_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# The configuration with its lock; and this machine's own: caches, catalog, logs. Any user may be chosen when it is run:
# weights are often their owner's alone to read (safetensors writes them so), and volumes take on these folders' mode.
VOLUME ["/config", "/state"]
WORKDIR /config
USER 10001:10001
CMD ["eval-platform", "--help"]
