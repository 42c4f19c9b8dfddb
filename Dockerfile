# onebyone with ONNX Runtime and OpenVINO:
#   docker build -t onebyone .
# Torch's CPU-only builds are much smaller: give their index by --build-arg PIP_EXTRA_INDEX_URL=….
#   docker run --rm -v "$PWD:/work" onebyone demo
FROM python:3.12-slim

ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir '.[openvino]' \
 && useradd --create-home user

USER user
WORKDIR /work
ENV ONEBYONE_CACHE=/tmp/onebyone
ENTRYPOINT ["onebyone"]
CMD ["--help"]
