# The server without weights: mount a checkpoint read-only under /models.
ARG BASE_IMAGE=python:3.12-slim-trixie

FROM ${BASE_IMAGE} AS builder
# With the address of PyTorch's CPU wheel index here the image has no CUDA and is several GB smaller.
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /src
RUN python -m venv /opt/venv
ENV PATH="/opt/venv/bin:${PATH}"

# The dependencies form a layer of their own, so that a change in the sources does not download torch again.
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > requirements.txt \
    && python -m pip install -c constraints.txt pip setuptools \
    && python -m pip install -c constraints.txt -r requirements.txt
COPY README.md LICENSE NOTICE ./
COPY model model
COPY server server
RUN python -m pip install -c constraints.txt --no-deps --no-build-isolation .


FROM ${BASE_IMAGE}
# With a GPU, Triton compiles at the first start: kernels for the device, and by this compiler what launches them.
# No version is pinned: Debian keeps only its newest.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 speechllm \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin speechllm
COPY --from=builder /opt/venv /opt/venv
ENV PATH="/opt/venv/bin:${PATH}" \
    PYTHONUNBUFFERED=1 \
    SPEECHLLM_HOST=0.0.0.0 \
    SPEECHLLM_PORT=8000 \
    SPEECHLLM_MODEL=/models/default
WORKDIR /home/speechllm
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['SPEECHLLM_PORT']}/health/live\", timeout=4)"]
ENTRYPOINT ["speechllm"]
CMD ["serve"]
