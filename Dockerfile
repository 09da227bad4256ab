# qtool for processors, from the wheel that `make dist` wrote. Not tested: there was no Docker daemon where it was written.
#
#   make dist
#   docker build -t qtool .                                  # with extras: --build-arg EXTRAS='[tasks,gguf]'
#   docker run --rm -v "$PWD/out:/runs/out" --user "$(id -u):$(id -g)" qtool ptq quickstart
#
# Models and data sets from the hub lie in /cache; keep them with -v qtool-cache:/cache.

FROM python:3.11-slim

ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=

RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch==$TORCH_VERSION"
RUN --mount=type=bind,source=dist,target=/dist \
    pip install --no-cache-dir "$(echo /dist/*.whl)$EXTRAS" && pip check

# any user may write to these folders, so that --user gives files of one's own; USER: a name for a user without one
RUN install -d -m 1777 /runs /cache
ENV HF_HOME=/cache/huggingface MPLCONFIGDIR=/cache/matplotlib USER=qtool
USER nobody
WORKDIR /runs
ENTRYPOINT ["qtool"]
CMD ["--help"]
