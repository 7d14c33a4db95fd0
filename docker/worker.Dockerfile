# The worker alone, for a GPU: loads one checkpoint, answers one plan, and has neither Dagster nor SQL.
#
#     docker build -f docker/worker.Dockerfile --build-arg TORCH_INDEX=... -t eval-platform-worker .
#     docker run --gpus all -v /shared:/shared eval-platform-worker /shared/state/workers/<folder>
#
# torch's CUDA builds bring CUDA's libraries with them; the host brings the driver (NVIDIA's container toolkit). So the
# base is the same as the platform's. TORCH_INDEX and the secret pip.conf are as in platform.Dockerfile.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt pyproject.toml README.md LICENSE ./
# --group came with pip 25.1.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python -m venv /opt/venv \
    && /opt/venv/bin/pip install "pip>=25.1,<27" \
    && /opt/venv/bin/pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} torch \
    && /opt/venv/bin/pip install -c constraints.txt --group worker --group metrics
COPY eval_platform eval_platform
COPY assets assets
COPY resources resources
COPY sensors sensors
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/venv/bin/pip install --no-deps .

FROM ${PYTHON_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /state platform \
    && install -d -o 10001 -g 10001 -m 1777 /state
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/state \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
VOLUME ["/state"]
WORKDIR /state
USER 10001:10001
ENTRYPOINT ["python", "-m", "eval_platform.worker"]
CMD ["--help"]
