"""A PDF in the conversation: uploaded once, put into state, shown to the model by its key, and asked about on a fork.

With OPENAI_API_KEY or OPENAI_BASE_URL set, that model reads it; otherwise the built-in offline one describes what it
received.
"""

import tempfile
from pathlib import Path

import notecase
import serving
from notecase import v1
from serving import say, server

PDF = b"""%PDF-1.4
1 0 obj << /Type /Catalog /Pages 2 0 R >> endobj
2 0 obj << /Type /Pages /Kids [3 0 R] /Count 1 >> endobj
3 0 obj << /Type /Page /Parent 2 0 R /MediaBox [0 0 300 100] /Contents 4 0 R
  /Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >> endobj
4 0 obj << /Length 66 >> stream
BT /F1 12 Tf 20 50 Td (The violin is in the old boathouse.) Tj ET
endstream endobj
trailer << /Root 1 0 R >>
"""


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.pdf"
        path.write_bytes(PDF)
        async with server(Path(folder) / "notecase.db") as address, notecase.Client(address) as client:
            await client.put_agent("detective", "You are a detective. Answer in one sentence.")
            plan = await client.upload(path)
            session = await client.create_session("detective", state={"plan": plan})
            say(f"{plan.filename}, {plan.size_bytes} bytes, is {plan.name[:14]}…, and in state as plan.\n")

            question = v1.Message(parts=[v1.Part(text="Where is the violin?"), v1.Part(state_key="plan")])
            say((await client.invoke(question, session=session)).text + "\n")

            fork = await client.fork(session, at_sequence=1)
            say("Asked again in a fork of the session as it was before the first question:\n")
            say((await client.invoke(question, session=fork)).text)


if __name__ == "__main__":
    serving.run(main())
