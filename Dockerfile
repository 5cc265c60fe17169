# The image's Python is the one that CI tests with.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
WORKDIR /src
COPY constraints.txt ./
COPY client client
COPY server server
# The build backend is pinned, and is not in the final environment, which has no pip either.
RUN python -m pip install --quiet --no-cache-dir --constraint constraints.txt pip hatchling \
 && python -m pip wheel --quiet --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels ./client ./server \
 && python -m venv --without-pip /opt/notecase \
 && python -m pip --python /opt/notecase/bin/python install --quiet --no-cache-dir --constraint constraints.txt \
    /wheels/*.whl 'notecase-server[postgres]'

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="notecase" \
      org.opencontainers.image.description="A self-hosted service that runs LLM agents and keeps their conversations, over gRPC." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
# The user's id is fixed, so that a directory mounted on /data can be owned by it.
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin notecase \
 && install --directory --owner notecase --group notecase --mode 0700 /data
COPY --from=build /opt/notecase /opt/notecase
# NOTECASE_GRACE is how long a stop takes. Docker kills a container 10 s after its stop signal by default;
# with a longer one (--stop-timeout, stop_grace_period, terminationGracePeriodSeconds) raise this, too.
ENV PATH=/opt/notecase/bin:$PATH PYTHONUNBUFFERED=1 \
    NOTECASE_LISTEN=0.0.0.0:7420 NOTECASE_STORE=sqlite:/data/notecase.db NOTECASE_GRACE=6
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 7420
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s \
    CMD ["notecase", "health"]
# --insecure because nobody can reach the container's own loopback: publish the port on 127.0.0.1. With keys the command is
# `serve --auth keys`, which is refused together with --insecure, with TLS or --behind-tls-proxy: see docs/operate.md.
ENTRYPOINT ["notecase"]
CMD ["serve", "--insecure"]
