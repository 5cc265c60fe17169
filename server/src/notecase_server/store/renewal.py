"""What names a session's uid inside of serialized messages, and follows when the session gets another one."""

from google.protobuf.message import DecodeError
from notecase import v1


def renewed_session(body: bytes, uid: str) -> bytes:
    """Returns a stored session with another uid. Its etag follows, so that one from before does not fit. Raises
    DecodeError."""
    session = v1.Session.FromString(body)
    session.uid = uid
    session.etag = f"{uid[:8]}-{session.etag.rpartition('-')[2]}"
    return session.SerializeToString()


def renewed_answer(response: bytes, former: str, uid: str) -> bytes:
    """Returns the recorded answer of a request. One that is the session with the former uid gets the new one."""
    try:
        session = v1.Session.FromString(response)
    except DecodeError:
        return response
    return renewed_session(response, uid) if session.uid == former else response
