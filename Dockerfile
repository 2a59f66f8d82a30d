# llmconvert, with the torch that pip finds, or the one of another index (of torch's builds for the processor, or for CUDA):
#
#   docker build -t llmconvert .
#   docker build -t llmconvert:cpu --build-arg TORCH_INDEX=URL .
#   docker run --rm -v "$PWD:/data" -v "$HOME/.cache/huggingface:/cache" llmconvert doctor
#
# Models and outputs lie in /data, downloads in /cache. A token is passed by `-e HF_TOKEN`, and is no part of the image.
FROM python:3.12-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY llmconvert llmconvert
COPY quantize quantize
COPY convert convert
COPY validate validate
COPY recipes recipes
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:3.12-slim
ARG TORCH_INDEX=
COPY constraints.txt /tmp/constraints.txt
# The version is pinned, by the file of constraints.
# hadolint ignore=DL3013
RUN version="$(sed -n 's/^torch==//p' /tmp/constraints.txt)" \
    && pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$version"
COPY --from=wheel /dist /dist
RUN pip install --no-cache-dir -c /tmp/constraints.txt /dist/*.whl \
    && rm -r /dist /tmp/constraints.txt \
    && useradd --create-home --uid 1000 llmconvert \
    && mkdir -p /data /cache \
    && chown llmconvert /data /cache
USER 1000
ENV HF_HOME=/cache
WORKDIR /data
ENTRYPOINT ["llmconvert"]
CMD ["--help"]
