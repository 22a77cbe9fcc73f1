// Streams a completion and prints each event as one JSON line.
// Usage: node generate.js PROTOS HOST:PORT REQUEST_JSON
"use strict";

const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [protos, target, request] = process.argv.slice(2);
const definition = loader.loadSync("phalanx/v1/inference.proto", {
  includeDirs: [protos],
  keepCase: true,
  longs: Number,
  enums: String,
  defaults: true,
  oneofs: true,
});
const { InferenceService } = grpc.loadPackageDefinition(definition).phalanx.v1;

const client = new InferenceService(target, grpc.credentials.createInsecure());
const call = client.Generate(JSON.parse(request));
call.on("data", (event) => console.log(JSON.stringify(event)));
call.on("error", (error) => {
  console.error(JSON.stringify({ code: grpc.status[error.code], details: error.details }));
  process.exitCode = 1;
});
call.on("end", () => client.close());
