# The app in a container, at the host's own address alone, its models kept in a volume:
#
#   docker build -t san-hf-app .
#   docker run -p 127.0.0.1:7860:7860 -v san-hf-models:/models san-hf-app --model san-vit-b-16
#
# On x86, PyPI's torch brings CUDA, for `docker run --gpus all`. For an image without it, several gigabytes smaller, give
# the address of PyTorch's CPU builds, which is on its own page: --build-arg PIP_EXTRA_INDEX_URL=ADDRESS
FROM python:3.12-slim-bookworm

ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HF_HOME=/models

WORKDIR /srv/san_hf
COPY constraints.txt ./
# A layer of its own: it is large, and changes seldom.
RUN pip install --constraint constraints.txt torch
COPY LICENSE MANIFEST.in README.md pyproject.toml setup.py ./
COPY model_cards model_cards
COPY modeling modeling
COPY san_hf san_hf
RUN pip install --constraint constraints.txt ".[app]" \
    && useradd --uid 1000 --create-home visitor \
    && install --directory --owner visitor /models

USER 1000
WORKDIR /models
VOLUME /models
EXPOSE 7860
HEALTHCHECK --start-period=5m CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:7860/', timeout=5)"]
ENTRYPOINT ["san-hf", "app", "--host", "0.0.0.0", "--port", "7860"]
