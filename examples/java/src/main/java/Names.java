import com.google.protobuf.*;
import dev.notecase.v1.*;
import dev.notecase.v1.Blob;
import dev.notecase.v1.Context;
import dev.notecase.v1.Error;
import dev.notecase.v1.Event;
import dev.notecase.v1.Message;
import dev.notecase.v1.Value;
import io.grpc.*;

/**
 * The messages whose names others have too, each with its namesake. An import of one name wins over every <code>*</code>, and
 * over java.lang; the namesake is then written in full. Compiled with the example and not run.
 */
final class Names {
  static void raise(Error failure) {
    throw new java.lang.Error(failure.getMessage());
  }

  static com.google.protobuf.Message any(Message message) {
    return message;
  }

  static Context context(Agent agent, io.grpc.Context call) {
    return agent.getLlm().getContext();
  }

  static com.google.protobuf.Value plain(Value value) {
    return com.google.protobuf.Value.newBuilder().setStringValue(value.getStringValue()).build();
  }

  static Blob blob(Part part) {
    return part.getBlob();
  }

  static java.util.List<Event> events(RunResponse frame) {
    return frame.getBatch().getEventsList();
  }
}
