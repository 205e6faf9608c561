# docker build --target cpu -t ingle:cpu .      docker run -e INGLE_API_KEY -p 8000:8000 -v ingle:/data ingle:cpu
# docker build --target cuda -t ingle:cuda .    docker run --gpus all -e INGLE_API_KEY -p 8000:8000 -v ingle:/data ingle:cuda
# Without a key the server does not start, unless INGLE_ALLOW_OPEN=1. docs/deploying.md says more.
ARG PYTHON=3.11

# ---- a wheel with the CPU's kernels compiled
FROM python:${PYTHON}-slim-bookworm AS wheel
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# ---- what both images share: a user without rights, a folder for models, where it listens
FROM python:${PYTHON}-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    INGLE_HOME=/data \
    HF_HOME=/data/huggingface \
    MODELSCOPE_CACHE=/data/modelscope
RUN useradd --uid 10001 --create-home ingle \
    && install -d -o ingle -g ingle /data
COPY constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheels /tmp/wheels
EXPOSE 8000
VOLUME /data
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
ENTRYPOINT ["ingle"]

# ---- for GPUs: PyTorch brings CUDA, the host its driver
FROM base AS cuda
ARG TORCH_INDEX=
RUN pip install -c /tmp/constraints.txt ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} torch \
    && pip install -c /tmp/constraints.txt /tmp/wheels/*.whl \
    && rm -rf /tmp/wheels /tmp/constraints.txt
# Triton compiles a launcher for its kernels when they first run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
WORKDIR /home/ingle
CMD ["serve", "smollm2:135m", "--host", "0.0.0.0"]

# ---- for CPUs, and what is built when no target is named: PyTorch without CUDA
FROM base AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install -c /tmp/constraints.txt --index-url ${TORCH_INDEX} torch \
    && pip install -c /tmp/constraints.txt /tmp/wheels/*.whl \
    && rm -rf /tmp/wheels /tmp/constraints.txt
USER 10001
WORKDIR /home/ingle
CMD ["serve", "smollm2:135m", "--host", "0.0.0.0"]
