import com.google.rpc.ErrorInfo;
import dev.notecase.v1.*;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.StatusException;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.BlockingClientCall;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.function.Consumer;

/**
 * One conversation with notecase from Java: an agent, a session, a streamed reply, the log, and an error told by its reason.
 *
 * <pre>mvn compile exec:java -Dexec.args=127.0.0.1:7420</pre>
 */
public final class Conversation {
  public static void main(String[] args) throws Exception {
    var out = new PrintStream(System.out, true, StandardCharsets.UTF_8);
    var address = args.length > 0 ? args[0] : "127.0.0.1:7420";
    var channel = Grpc.newChannelBuilder(address, InsecureChannelCredentials.create()).build();
    var agents = AgentServiceGrpc.newBlockingV2Stub(channel);
    var sessions = SessionServiceGrpc.newBlockingV2Stub(channel);
    var runs = RunServiceGrpc.newBlockingV2Stub(channel); // Its streams are experimental in grpc-java; StreamObserver is stable.

    var llm = LlmAgent.newBuilder().setProvider("offline").setInstruction("You are a detective.");
    var agent = agents.updateAgent(UpdateAgentRequest.newBuilder()
        .setAgent(Agent.newBuilder().setName("agents/detective").setLlm(llm))
        .setAllowMissing(true) // The first time it is created, and this program can be run again.
        .build());
    var session = sessions.createSession(CreateSessionRequest.newBuilder()
        .setSession(Session.newBuilder().setAgent(agent.getName()))
        .build());
    out.printf("Opened %s.%n", session.getName());

    var question = Message.newBuilder().addParts(Part.newBuilder().setText("Where do we begin?"));
    var start = StartRun.newBuilder().setSession(session.getName()).addMessages(question);
    var run = runs.run();
    run.write(RunRequest.newBuilder().setStart(start).build());
    run.halfClose(); // No more commands; the reply comes nonetheless.
    each(run, event -> {
      out.print(event.getBlockDelta().getText());
      if (event.hasMessageDiscarded()) out.println(); // The reply begins anew.
    });

    // A stream that broke is taken up after the last sequence seen; after 0 comes the whole log.
    var log = WatchEventsRequest.newBuilder().setName(session.getName()).setAfterSequence(0).build();
    out.printf("%nThe log has %d events.%n", each(runs.watchEvents(log), event -> {}));

    try {
      sessions.getSession(GetSessionRequest.newBuilder().setName("sessions/nobody").build());
    } catch (StatusException refusal) {
      var status = StatusProto.fromThrowable(refusal);
      for (var detail : status.getDetailsList()) {
        if (detail.is(ErrorInfo.class)) out.printf("%s: %s%n", detail.unpack(ErrorInfo.class).getReason(), status.getMessage());
      }
    }
    channel.shutdown();
  }

  /** Takes the events of a stream until the server ends it, and counts them. */
  static int each(BlockingClientCall<?, RunResponse> stream, Consumer<Event> take) throws Exception {
    int count = 0;
    for (var frame = stream.read(); frame != null; frame = stream.read()) {
      frame.getBatch().getEventsList().forEach(take);
      count += frame.getBatch().getEventsCount();
    }
    return count;
  }
}
