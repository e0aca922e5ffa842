// Apache Avro Java as the judge: one request a line on stdin, one answer a line on stdout, tab separated.
//
//   CHECK   reader  writer          -> COMPATIBLE | INCOMPATIBLE kind@location … | THROWS class message
//   FORM    schema                  -> canonical form  fingerprint (CRC-64-AVRO, signed decimal) | THROWS class message
//   DECODE  reader  writer  hex     -> hex of the value as the reader sees it, written again | THROWS class message
//   SINGLE  schema  hex             -> hex of the value of an Avro single object message | THROWS class message
//   ENCODE  schema  json            -> hex of the value, then hex of it as a single object message | THROWS class message

import java.io.BufferedReader;
import java.io.ByteArrayOutputStream;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.util.HexFormat;
import java.util.List;
import java.util.stream.Collectors;
import org.apache.avro.NameValidator;
import org.apache.avro.Schema;
import org.apache.avro.SchemaCompatibility;
import org.apache.avro.SchemaNormalization;
import org.apache.avro.generic.GenericData;
import org.apache.avro.generic.GenericDatumReader;
import org.apache.avro.generic.GenericDatumWriter;
import org.apache.avro.io.BinaryDecoder;
import org.apache.avro.io.BinaryEncoder;
import org.apache.avro.io.DecoderFactory;
import org.apache.avro.io.EncoderFactory;
import org.apache.avro.message.BinaryMessageDecoder;
import org.apache.avro.message.BinaryMessageEncoder;

public class Oracle {
  public static void main(String[] args) throws Exception {
    BufferedReader in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    PrintStream out = new PrintStream(System.out, false, StandardCharsets.UTF_8);
    for (String line = in.readLine(); line != null; line = in.readLine()) {
      String answer;
      try {
        answer = answer(line.split("\t", -1));
      } catch (Throwable error) {
        answer = "THROWS " + error.getClass().getSimpleName() + " " + error.getMessage();
      }
      out.println(answer.replace('\n', ' '));
    }
    out.flush();
  }

  static String answer(String[] request) throws Exception {
    switch (request[0]) {
      case "CHECK":
        return check(parse(request[1]), parse(request[2]));
      case "FORM":
        Schema schema = parse(request[1]);
        return SchemaNormalization.toParsingForm(schema) + "\t" + SchemaNormalization.parsingFingerprint64(schema);
      case "DECODE":
        return decode(parse(request[1]), parse(request[2]), HexFormat.of().parseHex(request[3]));
      case "SINGLE":
        return single(parse(request[1]), HexFormat.of().parseHex(request[2]));
      case "ENCODE":
        return encode(parse(request[1]), request[2]);
      default:
        throw new IllegalArgumentException(request[0]);
    }
  }

  static Schema parse(String text) {
    return new Schema.Parser(NameValidator.STRICT_VALIDATOR).parse(text);
  }

  static String check(Schema reader, Schema writer) {
    var result = SchemaCompatibility.checkReaderWriterCompatibility(reader, writer).getResult();
    if (result.getCompatibility() == SchemaCompatibility.SchemaCompatibilityType.COMPATIBLE) {
      return "COMPATIBLE";
    }
    List<SchemaCompatibility.Incompatibility> found = result.getIncompatibilities();
    return "INCOMPATIBLE "
        + found.stream().limit(50).map(one -> one.getType() + "@" + one.getLocation()).collect(Collectors.joining(" "));
  }

  static String decode(Schema reader, Schema writer, byte[] data) throws Exception {
    BinaryDecoder decoder = DecoderFactory.get().binaryDecoder(data, null);
    Object value = new GenericDatumReader<Object>(writer, reader, new GenericData()).read(null, decoder);
    if (!decoder.isEnd()) {
      throw new IllegalStateException("left over");
    }
    return HexFormat.of().formatHex(binary(reader, value));
  }

  static byte[] binary(Schema schema, Object value) throws Exception {
    ByteArrayOutputStream made = new ByteArrayOutputStream();
    BinaryEncoder encoder = EncoderFactory.get().directBinaryEncoder(made, null);
    new GenericDatumWriter<Object>(schema).write(value, encoder);
    return made.toByteArray();
  }

  static String single(Schema schema, byte[] data) throws Exception {
    Object value = new BinaryMessageDecoder<Object>(new GenericData(), schema).decode(data);
    return HexFormat.of().formatHex(binary(schema, value));
  }

  static String encode(Schema schema, String text) throws Exception {
    Object value = new GenericDatumReader<Object>(schema).read(null, DecoderFactory.get().jsonDecoder(schema, text));
    ByteBuffer single = new BinaryMessageEncoder<Object>(new GenericData(), schema).encode(value);
    byte[] whole = new byte[single.remaining()];
    single.get(whole);
    return HexFormat.of().formatHex(binary(schema, value)) + "\t" + HexFormat.of().formatHex(whole);
  }
}
