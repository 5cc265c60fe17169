# The image's Python is the one that CI tests with.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
WORKDIR /src
COPY constraints.txt ./
COPY client client
COPY server server
# The build backend is pinned and kept out of the environment that ships, which holds no pip either.
RUN python -m pip install --quiet --no-cache-dir --constraint constraints.txt pip hatchling \
 && python -m pip wheel --quiet --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels ./client ./server \
 && python -m venv --without-pip /opt/notecase \
 && python -m pip --python /opt/notecase/bin/python install --quiet --no-cache-dir --constraint constraints.txt /wheels/*.whl

FROM python:${PYTHON}
# A fixed id, so that who mounts a directory on /data knows whom to give it to.
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin notecase \
 && install --directory --owner notecase --group notecase --mode 0700 /data
COPY --from=build /opt/notecase /opt/notecase
ENV PATH=/opt/notecase/bin:$PATH PYTHONUNBUFFERED=1 \
    NOTECASE_LISTEN=0.0.0.0:7420 NOTECASE_STORE=sqlite:/data/notecase.db
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 7420
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s \
    CMD ["notecase", "health"]
# --insecure because the container's own loopback reaches nobody: publish the port on 127.0.0.1. With keys the command is
# `serve --auth keys`, which is refused together with --insecure, with TLS or --behind-tls-proxy: see docs/operate.md.
ENTRYPOINT ["notecase"]
CMD ["serve", "--insecure"]
