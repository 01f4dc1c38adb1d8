# docker build -t lvlm-prune . && docker run --rm -v "$PWD/runs:/work/runs" lvlm-prune prune --pruning.sparsity 0.6
# Tests:      docker run --rm --workdir /source --entrypoint python lvlm-prune -m pytest -n 2 --dist loadfile
# With a GPU: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 ..., docker run --gpus all ...
FROM python:3.11-slim

# The kernels of packed models are compiled when the package is installed.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir "torch>=2.9,<2.14" --index-url "$TORCH_INDEX"

COPY . /source
RUN pip install --no-cache-dir "/source[dev]"
# Tests import the checkout: the kernels belong beside its modules.
RUN cd /source && python setup.py --quiet build_ext --inplace

WORKDIR /work
ENTRYPOINT ["lvlm-prune"]
