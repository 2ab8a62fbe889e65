# The images: `make images`. A step's command is the same in each; what differs is what the machine must have.
#
#   steps          every step on CPUs; CUDA libraries that torch does not load there are left out
#   training       every step, on CUDA devices
#   serving        TorchServe on CPUs
#   serving-cuda   TorchServe on CUDA devices
#
# BASE_IMAGE is a Debian or Ubuntu with Python 3.11 or 3.12 and venv. In production pin it by its digest, as in
# BASE_IMAGE=python:3.11-slim@sha256:...; where no registry is reached, `.ci/base-image` makes one.
# The secret `certificates`, a bundle of authorities in PEM form, is for networks that bring their own.

ARG BASE_IMAGE=python:3.11-slim

# --- What is built, and left behind -------------------------------------------------------------------

FROM ${BASE_IMAGE} AS cuda
COPY requirements/uv.txt /build/
RUN --mount=type=secret,id=certificates \
    if [ -s /run/secrets/certificates ]; then export PIP_CERT=/run/secrets/certificates; fi \
    && python3 -m venv /build/venv \
    && /build/venv/bin/pip install --quiet --no-cache-dir --require-hashes --requirement /build/uv.txt
ENV PATH=/build/venv/bin:$PATH UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 PYC_INVALIDATION_MODE=UNCHECKED_HASH
COPY requirements/steps.txt /build/
RUN --mount=type=secret,id=certificates \
    if [ -s /run/secrets/certificates ]; then export SSL_CERT_FILE=/run/secrets/certificates; fi \
    && uv venv --quiet --python "$(PATH=/usr/local/bin:/usr/bin command -v python3)" /opt/venv \
    && uv pip sync --quiet --python /opt/venv --require-hashes /build/steps.txt \
    && rm -rf /opt/venv/lib/python3*/site-packages/torch/include
RUN printf '#!/opt/venv/bin/python\nfrom cadx.__main__ import main\n\nmain()\n' >/opt/venv/bin/cadx \
    && chmod +x /opt/venv/bin/cadx

# torch links to most of CUDA, and cannot be imported without. These are opened only once there is a device.
FROM cuda AS cpu
RUN cd /opt/venv/lib/python3*/site-packages \
    && rm -rf triton nvidia/cudnn/lib/libcudnn_* nvidia/cu13/lib/libcusolver* torch/lib/libtorch_cuda_linalg.so \
       nvidia/cu13/lib/libnvrtc.alt.* nvidia/cu13/lib/libnvperf_* nvidia/nvshmem/lib/libnvshmem_device.* nvidia/*/include \
    && /opt/venv/bin/python -c 'import torch, torchvision'

# What a server needs beyond the steps: only its files, to lie above theirs.
FROM cuda AS torchserve
COPY requirements/serving.txt /build/
RUN --mount=type=secret,id=certificates \
    if [ -s /run/secrets/certificates ]; then export SSL_CERT_FILE=/run/secrets/certificates; fi \
    && touch /build/before \
    && uv pip install --quiet --python /opt/venv --require-hashes --requirement /build/serving.txt \
    && mkdir /build/added && cd /opt/venv && find . -newercm /build/before \( -type f -o -type l \) -print0 \
    | tar --create --null --files-from=- | tar --extract --directory /build/added

FROM ${BASE_IMAGE} AS code
COPY . /opt/cadx/
RUN rm -rf /opt/cadx/requirements \
    && python3 -m compileall -q --invalidation-mode unchecked-hash /opt/cadx

# --- What runs ----------------------------------------------------------------------------------------

FROM ${BASE_IMAGE} AS runtime
# Clusters choose the user, and may mount the root read-only: whatever is written goes to /tmp.
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/cadx PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib \
    DO_NOT_TRACK=true GX_ANALYTICS_ENABLED=false HF_HUB_DISABLE_TELEMETRY=1
# TorchServe ends its workers by the program `kill`, which a slim base has as a word of its shell alone.
RUN printf '#!/bin/sh\nkill "$@"\n' > /usr/local/bin/kill && chmod 755 /usr/local/bin/kill
WORKDIR /opt/cadx
USER 65532:65532

FROM runtime AS steps
COPY --from=cpu /opt/venv /opt/venv
COPY --from=code /opt/cadx /opt/cadx
CMD ["cadx", "--help"]

FROM runtime AS training
COPY --from=cuda /opt/venv /opt/venv
COPY --from=code /opt/cadx /opt/cadx
CMD ["cadx", "--help"]

FROM runtime AS serving
COPY --from=cpu /opt/venv /opt/venv
COPY --from=torchserve /build/added /opt/venv
COPY --from=code /opt/cadx /opt/cadx
CMD ["cadx", "serve", "/tmp/serving"]

FROM runtime AS serving-cuda
COPY --from=cuda /opt/venv /opt/venv
COPY --from=torchserve /build/added /opt/venv
COPY --from=code /opt/cadx /opt/cadx
CMD ["cadx", "serve", "/tmp/serving"]
