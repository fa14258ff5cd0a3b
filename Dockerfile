# syntax=docker/dockerfile:1
# The program in a container, for a CPU or, with CUDA, for GPUs; nobody is root in it.
#
#   docker build -t dino-lightning .
#   docker build -t dino-lightning:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#
#   docker run --rm -v "$PWD/runs:/data/runs" dino-lightning fit                               # the demo
#   docker run --rm -v "$PWD:/data" --gpus all --shm-size 4g dino-lightning:cuda fit --data.root plans
#   docker run --rm -p 8080:8080 -v "$PWD/model:/opt/ml/model:ro" --entrypoint python dino-lightning -m sagemaker_entry.serve
#
# The folder that is mounted must be writable for the user of the container: build with --build-arg UID=$(id -u).
# An image for jobs on SageMaker is docs/Dockerfile, one for endpoints docs/serve/Dockerfile.
FROM python:3.12-slim-bookworm

# whl/cpu, or whl/cu126, whl/cu128, ...: the driver of the machine must know the version of CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG UID=1000

RUN useradd --uid "${UID}" --create-home dino && mkdir /data && chown dino /data

# PyTorch apart from the rest: a change of the code leaves its gigabytes alone.
RUN --mount=type=cache,target=/var/cache/pip \
    PIP_CACHE_DIR=/var/cache/pip pip install --index-url "${TORCH_INDEX}" "torch>=2.6" "torchvision>=0.21"

COPY pyproject.toml README.md LICENSE /src/
COPY configs /src/configs
COPY sagemaker_entry /src/sagemaker_entry
COPY dino_lightning /src/dino_lightning
RUN --mount=type=cache,target=/var/cache/pip \
    PIP_CACHE_DIR=/var/cache/pip pip install -c /src/sagemaker_entry/container/constraints.txt "/src[export,serve,timm]"

USER ${UID}
WORKDIR /data
ENV PYTHONUNBUFFERED=1
EXPOSE 8080
ENTRYPOINT ["dino-lightning"]
CMD ["fit"]
