# One image for everything that the README shows.
#
#   docker build -t dal_med .                                                   CPU; smaller with --build-arg CPU_INDEX=...
#   docker build -t dal_med-cuda --build-arg DEVICE=cuda .                      NVIDIA GPU (about 6 GB more)
#   docker run --rm -it --network host dal_med                                  JupyterLab, as its output says, on this machine only
#   docker run --rm -it -p 127.0.0.1:8888:8888 -e JUPYTER_IP=0.0.0.0 dal_med    the same where there is no host network
#   docker run --rm -v "$PWD/runs:/home/dal/project/runs" dal_med make demo     results stay in runs/
#   docker run --rm --gpus all dal_med-cuda dal_sweep SWEEP.yaml runs/OUT --gpus 1
#
# A mounted folder must be writable for user 1000; --build-arg USER_ID="$(id -u)" makes it yours.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

# cuda: the wheels of the package index, which run on a CPU as well. cpu: wheels without CUDA, several GB less, if CPU_INDEX names an index that has them
# (pytorch.org says which); without it both are the same
ARG DEVICE=cpu
ARG CPU_INDEX=
ARG USER_ID=1000

# Debian drops a package's older versions from its index, so a pinned one would soon not build any more
# hadolint ignore=DL3008
RUN case "$DEVICE" in cpu|cuda) ;; *) echo "DEVICE is '$DEVICE'; it must be cpu or cuda" >&2; exit 2;; esac \
    && apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid "$USER_ID" --shell /bin/bash dal \
    && install --directory --owner=dal --group=dal /opt/dal_med /home/dal/project

# VENV is where the Makefile looks for its environment; the last two let NVIDIA's container toolkit pass the GPUs on
ENV VENV=/opt/dal_med \
    PATH=/opt/dal_med/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

USER $USER_ID
WORKDIR /home/dal/project

# only what defines the environment, so that a changed notebook does not build it anew
COPY --chown=dal:dal Makefile constraints.txt settings.ini setup.py README.md ./
COPY --chown=dal:dal dal_med/__init__.py dal_med/
RUN if [ "$DEVICE" = cpu ] && [ -n "$CPU_INDEX" ]; then export PIP_EXTRA_INDEX_URL="$CPU_INDEX"; fi \
    && make setup

COPY --chown=dal:dal . .
# the lock is as it was, but may carry a later date now: the environment is ready all the same
RUN touch "$VENV/ready"

EXPOSE 8888
CMD ["sh", "-c", "exec jupyter lab --no-browser --ip=\"${JUPYTER_IP:-127.0.0.1}\" --port=8888 nbs"]
