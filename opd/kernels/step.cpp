// New tokens of cached sequences through a whole DeepSeek-V4, as one call.
//
// The operators, their order and their arguments are those of `DeepseekV4.extend` and of what it calls, so the bits of
// the results are too. What goes away is Python's part: some sixty calls a layer, which at small width take longer than
// what they compute. A step is made for weights and a cache that stay as they are while it lives; tensors are found
// under their published names.
//
// float32 on the CPU, four streams, caches that hold float32 rows (index keys may be MXFP4). opd/model/step.py decides
// what comes here. Left out: gradients, and the equations (opd/model).

#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <vector>

#include "operators.h"

namespace {

using at::Tensor;
using opd::Maybe;
using Tensors = c10::Dict<std::string, Tensor>;
using Sizes = c10::Dict<std::string, int64_t>;
using Numbers = c10::Dict<std::string, double>;

constexpr int64_t BLOCK = 32;               // numbers that share a scale in MXFP4
constexpr int64_t QUERY_NUMBERS = 1 << 21;  // of index queries that exist at a time
// Threads each take some of the rows through all layers, and never wait for each other, where the weights are few
// enough to be read by each from a shared cache; otherwise they share every single product. Rows do not depend on each
// other.
constexpr int64_t SMALL = 32 << 20;
constexpr int64_t LEAST_TOKENS = 8;   // of a share
constexpr double PATIENCE = .1;       // how much of what a thread was late by changes its next share
constexpr int64_t MOST_TOKENS = 256;  // of a share of several rows: what operators pass on fits in a core's cache

template <typename Value>
Value named(const c10::Dict<std::string, Value>& values, const std::string& name) {
  const auto found = values.find(name);
  TORCH_CHECK(found != values.end(), "a step needs ", name);
  return found->value();
}

// Rows of new tokens [B, T], as an `Extension` of opd/model/cache.py says, whose tokens are the call's from `first` on.
// Rows of one width are one part of a call: decoding ones, and chunks of prompts.
struct Part {
  Tensor token_ids, slots, starts, lengths, positions, pages;
  int64_t max_end;
  Tensor record = {};  // int16 [B, T, L, K], to be filled with expert ids, if these are asked for
  int64_t batch = 0, tokens = 0, first = 0;
  Tensor seen = {};  // int64 [B, T], positions with padding moved back to its row's last token

  int64_t count() const { return batch * tokens; }
  // This part's of what there is for every token of the call, [N, ..] -> [B, T, ..].
  Tensor of(const Tensor& x) const {
    std::vector<int64_t> shape = x.sizes().vec();
    shape[0] = tokens;
    shape.insert(shape.begin(), batch);
    return x.narrow(0, first, count()).view(shape);
  }
  Part rows(int64_t begin, int64_t end) const {
    const auto some = [&](const Tensor& x) { return x.slice(0, begin, end); };
    const int64_t *start = starts.const_data_ptr<int64_t>(), *length = lengths.const_data_ptr<int64_t>();
    int64_t most = 0;  // young rows by themselves have nothing to choose from
    for (int64_t b = begin; b < end; ++b) most = std::max(most, start[b] + length[b]);
    return {some(token_ids), some(slots), some(starts), some(lengths), some(positions), some(pages), most,
            record.defined() ? some(record) : record};
  }
  // Its rows' last tokens alone, as the call's tokens from `before` on: decoding rows.
  Part ends(int64_t before) const {
    const Tensor at = at::add(starts, lengths).sub_(1);
    const Tensor position = at.unsqueeze(1);
    const Tensor one = at::ones_like(lengths), seen = at::add(position, 1);
    return {token_ids, slots, at, one, position, pages, max_end, {}, batch, 1, before, seen};
  }
  // Of the experts of every token of the call, int64 [N, K], this part's become those of `layer` of its record.
  void keep(const Tensor& chosen, int64_t layer) const {
    if (!record.defined()) return;
    const int64_t k = chosen.size(1), of_token = record.size(2) * k;
    const int64_t* from = chosen.const_data_ptr<int64_t>() + first * k;
    int16_t* to = record.mutable_data_ptr<int16_t>() + layer * k;
    for (int64_t t = 0; t < count(); ++t, from += k, to += of_token) std::copy_n(from, k, to);
  }
};

// Pairs [positions, P, 2] by which rows at these positions (times `unit`) are turned, as `rope_rotation` of
// opd/model/layers.py has them.
Tensor turns_at(const Tensor& positions, const Tensor& frequencies, int64_t unit = 1) {
  const int64_t count = positions.numel(), pairs = frequencies.numel();
  Tensor turns = opd::empty({count, pairs, 2}, frequencies.options());
  const int64_t* position = positions.const_data_ptr<int64_t>();
  const float* frequency = frequencies.const_data_ptr<float>();
  float* to = turns.mutable_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t p = 0; p < pairs; ++p, to += 2) {
      const float angle = static_cast<float>(position[i] * unit) * frequency[p];
      to[0] = std::cos(angle), to[1] = std::sin(angle);
    }
  }
  return turns;
}

Tensor norm(const Tensor& x, const Maybe& weight, double eps, const Maybe& turns = {}, int64_t heads = 1) {
  return std::get<0>(opd::norm(x, weight, turns, heads, eps, true, false));
}

Tensor turn(const Tensor& x, const Tensor& turns, int64_t heads, bool back) {
  return std::get<0>(opd::norm(x, {}, turns, heads, 0., false, back));
}

// One block of numbers as codes and a scale byte, as `quantize` of opd/fp4.py and `RowFormat.encode` make them.
void pack_block(const float* from, uint8_t* codes, uint8_t* scale) {
  constexpr uint8_t CODES[13] = {0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7};  // of twice a magnitude
  uint32_t largest = 0;
  bool finite = true;
  float values[BLOCK];
  for (int i = 0; i < BLOCK; ++i) finite &= std::isfinite(from[i]);
  for (int i = 0; i < BLOCK; ++i) {
    values[i] = std::isfinite(from[i]) ? from[i] : 0.f;
    uint32_t bits;
    std::memcpy(&bits, values + i, 4);
    largest = std::max(largest, bits & 0x7fffffffu);
  }
  const int32_t byte = std::max<int32_t>(1, int32_t((largest + 0x3fffffu) >> 23) - 2);
  const uint32_t inverse_bits = uint32_t(254 - byte) << 23;
  float inverse;
  std::memcpy(&inverse, &inverse_bits, 4);
  std::memset(codes, 0, BLOCK / 2);
  for (int i = 0; i < BLOCK; ++i) {
    const float magnitude = std::abs(values[i] * inverse);
    uint32_t bits;
    std::memcpy(&bits, &magnitude, 4);
    bits &= 0x7f800000u;
    float shift;
    std::memcpy(&shift, &bits, 4);
    shift = std::max(shift, 1.f) * 6291456.f;  // 1.5 * 2 ** 22: the sum's last place is the grid's step
    const float rounded = (magnitude + shift) - shift;
    const uint8_t code = CODES[int(rounded * 2)] | (std::signbit(values[i]) ? 8 : 0);
    codes[i / 2] |= i % 2 ? code << 4 : code;
  }
  *scale = finite ? byte : 255;
}

// The rows [B, T, C], but for each sequence's last few, go into a ring [slots, R, C] by position; of more than R of a
// sequence, the last R.
void write_ring(Tensor& ring, const Tensor& values, const Part& at, int64_t but = 0) {
  const int64_t size = ring.size(1), width = ring.size(2);
  const int64_t *slots = at.slots.const_data_ptr<int64_t>(), *starts = at.starts.const_data_ptr<int64_t>(),
                *lengths = at.lengths.const_data_ptr<int64_t>();
  const float* from = values.const_data_ptr<float>();
  float* to = ring.mutable_data_ptr<float>();
  for (int64_t b = 0; b < at.batch; ++b) {
    for (int64_t t = std::max<int64_t>(0, lengths[b] - but - size); t < lengths[b] - but; ++t) {
      std::memcpy(to + (slots[b] * size + (starts[b] + t) % size) * width, from + (b * at.tokens + t) * width,
                  width * sizeof(float));
    }
  }
}

struct Compressor {
  Tensor kv_proj, gate_proj, bias, norm_weight, ring_kv, ring_gate, entries, frequencies;
  Maybe hadamard;  // MXFP4 in this basis, or as it is
  int64_t ratio, per_page;
  double eps;
  bool overlap;

  Compressor(const Tensors& tensors, const Sizes& sizes, const Numbers& numbers, const std::string& prefix,
             const std::string& cache, const Tensor& frequencies, Maybe hadamard = {})
      : kv_proj(named(tensors, prefix + "kv_proj.weight")),
        gate_proj(named(tensors, prefix + "gate_proj.weight")),
        bias(named(tensors, prefix + "position_bias")),
        norm_weight(named(tensors, prefix + "kv_norm.weight")),
        ring_kv(named(tensors, cache + "kv")),
        ring_gate(named(tensors, cache + "gate")),
        entries(named(tensors, cache + "entries")),
        frequencies(frequencies),
        hadamard(std::move(hadamard)),
        ratio(named(sizes, "ratio")),
        per_page(entries.size(1)),
        eps(named(numbers, "eps")),
        overlap(named(sizes, "overlap") != 0) {}

  Tensor rounded(const Tensor& x) const { return hadamard ? opd::mxfp4_values(opd::linear(x, *hadamard)) : x; }

  void extend(const Tensor& h, const std::vector<Part>& parts) {
    const Tensor kv = opd::linear(h, kv_proj), gate = opd::linear(h, gate_proj);
    for (const Part& part : parts) extend(part.of(kv), part.of(gate), part);
  }

  void extend(const Tensor& kv, const Tensor& gate, const Part& at) {
    const auto [rows, blocks, pooled] =
        opd::compress_step(kv, gate, bias, ring_kv, ring_gate, at.slots, at.starts, at.lengths, overlap);
    const int64_t count = rows.numel();
    if (count == 0) return;
    const Tensor made = rounded(norm(pooled, norm_weight, eps, turns_at(blocks, frequencies, ratio)));
    const int64_t width = made.size(1), stored = entries.size(2);
    const int64_t *row = rows.const_data_ptr<int64_t>(), *block = blocks.const_data_ptr<int64_t>(),
                  *page = at.pages.const_data_ptr<int64_t>();
    const float* from = made.const_data_ptr<float>();
    for (int64_t i = 0; i < count; ++i, from += width) {
      const int64_t place = page[row[i] * at.pages.size(1) + block[i] / per_page] * per_page + block[i] % per_page;
      if (entries.scalar_type() == at::kFloat) {
        std::memcpy(entries.mutable_data_ptr<float>() + place * stored, from, width * sizeof(float));
        continue;
      }
      uint8_t* to = entries.mutable_data_ptr<uint8_t>() + place * stored;
      for (int64_t part = 0; part < width / BLOCK; ++part) {
        pack_block(from + part * BLOCK, to + part * BLOCK / 2, to + width / 2 + part);
      }
    }
  }
};

struct Indexer : Compressor {
  Tensor q_b_proj, weights_proj;
  int64_t heads, width, topk;

  Indexer(const Tensors& tensors, const Sizes& sizes, const Numbers& numbers, const std::string& prefix,
          const Tensor& frequencies, Maybe hadamard)
      : Compressor(tensors, sizes, numbers, prefix, "cache.indexer.", frequencies, std::move(hadamard)),
        q_b_proj(named(tensors, prefix + "q_b_proj.weight")),
        weights_proj(named(tensors, prefix + "scorer.weights_proj.weight")),
        heads(weights_proj.size(0)),
        width(q_b_proj.size(0) / heads),
        topk(named(sizes, "topk")) {}

  // int64 [B, T, k]: which of the first `count` entries each query attends to. Of every token: h, latent and turns. A
  // row that sees no more than `topk` has nothing to choose, and no index queries.
  Tensor pick(const Tensor& h, const Tensor& latent, const Tensor& turns, const Tensor& visible, int64_t count,
              const Part& at) const {
    const int64_t k = std::min(topk, count);
    const int64_t* sees = visible.const_data_ptr<int64_t>();
    std::vector<int64_t> rows;
    for (int64_t b = 0; b < at.batch; ++b) {
      if (*std::max_element(sees + b * at.tokens, sees + (b + 1) * at.tokens) > k) rows.push_back(b);
    }
    const int64_t chosen = rows.size();
    if (chosen == at.batch) return score(at.of(h), at.of(latent), at.of(turns), visible, at.pages, k, count);
    Tensor picks = opd::empty({at.batch, at.tokens, k}, visible.options());
    int64_t* to = picks.mutable_data_ptr<int64_t>();
    for (int64_t query = 0; query < at.count(); ++query, to += k) {
      for (int64_t i = 0; i < k; ++i) to[i] = i < sees[query] ? i : -1;
    }
    if (chosen == 0) return picks;
    Tensor index = opd::empty({chosen}, visible.options());
    std::copy(rows.begin(), rows.end(), index.mutable_data_ptr<int64_t>());
    const auto some = [&](const Tensor& x) { return at::index_select(x, 0, index); };
    const Tensor found =
        score(some(at.of(h)), some(at.of(latent)), some(at.of(turns)), some(visible), some(at.pages), k, count);
    const int64_t* from = found.const_data_ptr<int64_t>();
    to = picks.mutable_data_ptr<int64_t>();
    const int64_t of_row = at.tokens * k;
    for (int64_t i = 0; i < chosen; ++i) std::copy_n(from + i * of_row, of_row, to + rows[i] * of_row);
    return picks;
  }

  Tensor score(const Tensor& h, const Tensor& latent, const Tensor& turns, const Tensor& visible, const Tensor& pages,
               int64_t k, int64_t count) const {
    const Tensor table = pages.narrow(1, 0, (count + per_page - 1) / per_page).contiguous();
    const int64_t batch = h.size(0), tokens = h.size(1),
                  step = std::max<int64_t>(1, QUERY_NUMBERS / (batch * heads * width));
    std::vector<Tensor> found;
    for (int64_t begin = 0; begin < tokens; begin += step) {
      const int64_t size = std::min(step, tokens - begin);
      const auto some = [&](const Tensor& x) { return x.narrow(1, begin, size).contiguous(); };
      const Tensor query = opd::linear(some(latent), q_b_proj).view({batch, size, heads, width});
      const Tensor weights =
          at::mul(opd::linear(some(h), weights_proj), std::pow(static_cast<double>(width * heads), -0.5));
      const Tensor turned = turn(query, some(turns).view({-1, turns.size(2), 2}), heads, false);
      found.push_back(
          opd::index_pick(rounded(turned), weights, entries, table, some(visible), k, hadamard.has_value()));
    }
    return found.size() == 1 ? found[0] : at::cat(found, 1);
  }
};

struct HyperConnection {
  Tensor panel, base, scale;
  double norm_eps, hc_eps;
  int64_t iterations;

  struct Site {
    Tensor hidden, post, residual;
  };

  Site collapse(const Tensor& streams) const {
    auto [hidden, post, residual, mix, inverse] =
        opd::collapse_with_panel(streams, panel, base, scale, norm_eps, hc_eps, iterations);
    return {hidden, post, residual};
  }
};

// A stack of matrices for rows that are sorted by expert: packed, or as numbers.
struct Stack {
  Tensor codes, scales, matrices;
  int64_t features;

  Stack(const Tensors& tensors, const std::string& name, int64_t features) : features(features) {
    if (tensors.contains(name)) {
      matrices = tensors.at(name).mT();
    } else {
      codes = named(tensors, name + ".codes"), scales = named(tensors, name + ".scales");
    }
  }

  Tensor operator()(const Tensor& x, at::IntArrayRef sizes, const std::string& path) const {
    if (codes.defined()) return opd::fp4_linear(x, codes, scales, sizes, features, path);
    Tensor out = opd::empty({x.size(0), features}, x.options());
    opd::products_by_rows(x, matrices, sizes, out);
    return out;
  }
};

struct Layer {
  HyperConnection attn_hc, ffn_hc;
  Tensor input_norm, post_norm;
  Tensor q_a_proj, q_a_norm, q_b_proj, kv_proj, kv_norm, o_a_proj, o_b_proj, sinks, window, frequencies;
  std::optional<Compressor> compressor;
  std::optional<Indexer> indexer;
  Tensor router;
  Maybe hash, bias;
  Stack gate_up, down;
  Tensor shared_gate_up, shared_down;
  int64_t heads, groups, experts, per_token;
  double eps, limit, factor;
  bool is_sigmoid;

  Layer(const Tensors& t, const Sizes& sizes, const Numbers& numbers, const Tensor& frequencies)
      : attn_hc(connection(t, sizes, numbers, "attn_hc.")),
        ffn_hc(connection(t, sizes, numbers, "ffn_hc.")),
        input_norm(named(t, "input_layernorm.weight")),
        post_norm(named(t, "post_attention_layernorm.weight")),
        q_a_proj(named(t, "self_attn.q_a_proj.weight")),
        q_a_norm(named(t, "self_attn.q_a_norm.weight")),
        q_b_proj(named(t, "self_attn.q_b_proj.weight")),
        kv_proj(named(t, "self_attn.kv_proj.weight")),
        kv_norm(named(t, "self_attn.kv_norm.weight")),
        o_a_proj(named(t, "self_attn.o_a_proj.weight")),
        o_b_proj(named(t, "self_attn.o_b_proj.weight")),
        sinks(named(t, "self_attn.sinks")),
        window(named(t, "cache.window")),
        frequencies(frequencies),
        router(named(t, "mlp.gate.weight")),
        gate_up(t, "mlp.experts.gate_up_proj", named(sizes, "gate_up_features")),
        down(t, "mlp.experts.down_proj", named(sizes, "down_features")),
        shared_gate_up(at::cat({named(t, "mlp.shared_experts.gate_proj.weight"),
                                named(t, "mlp.shared_experts.up_proj.weight")})),
        shared_down(named(t, "mlp.shared_experts.down_proj.weight")),
        heads(named(sizes, "heads")),
        groups(named(sizes, "groups")),
        experts(named(sizes, "experts")),
        per_token(named(sizes, "experts_per_token")),
        eps(named(numbers, "eps")),
        limit(named(numbers, "swiglu_limit")),
        factor(named(numbers, "routed_scaling_factor")),
        is_sigmoid(named(sizes, "is_sigmoid") != 0) {
    const std::string prefix = "self_attn.compressor.", inner = prefix + "indexer.";
    if (t.contains(prefix + "kv_proj.weight")) {
      compressor.emplace(t, sizes, numbers, prefix, "cache.compressor.", frequencies);
    }
    if (t.contains(inner + "kv_proj.weight")) {
      indexer.emplace(t, sizes, numbers, inner, frequencies,
                      t.contains("hadamard") ? Maybe(t.at("hadamard")) : Maybe());
    }
    if (t.contains("mlp.gate.tid2eid")) {
      hash = t.at("mlp.gate.tid2eid");
    } else {
      bias = named(t, "mlp.gate.e_score_correction_bias");
    }
  }

  static HyperConnection connection(const Tensors& t, const Sizes& sizes, const Numbers& numbers,
                                    const std::string& prefix) {
    return {opd::mixing_panel(named(t, prefix + "fn")), named(t, prefix + "base"),   named(t, prefix + "scale"),
            named(numbers, "eps"),                      named(numbers, "hc_eps"),    named(sizes, "hc_iterations")};
  }

  // h [N, D] -> attention's heads [N, H, C] before they are turned back; the cache takes the new tokens in. With
  // `last`, the places of rows' last tokens among all, nobody asks for the others' heads.
  Tensor attend(const Tensor& h, const Tensor& turns, const std::vector<Part>& parts, const Maybe& last) {
    const Tensor keys = norm(opd::linear(h, kv_proj), kv_norm, eps, turns);
    if (compressor) compressor->extend(h, parts);
    if (indexer) indexer->extend(h, parts);
    if (!last) return attend_to(h, turns, keys, parts);
    std::vector<Part> ends;
    int64_t before = 0;
    for (const Part& part : parts) {
      write_ring(window, part.of(keys), part, 1);
      ends.push_back(part.ends(before));
      before += part.batch;
    }
    const auto of = [&](const Tensor& x) { return at::index_select(x, 0, *last); };
    return attend_to(of(h), of(turns), of(keys), ends);
  }

  Tensor attend_to(const Tensor& h, const Tensor& turns, const Tensor& keys, const std::vector<Part>& parts) {
    const Tensor latent = norm(opd::linear(h, q_a_proj), q_a_norm, eps);
    const Tensor query = norm(opd::linear(latent, q_b_proj).view({h.size(0), heads, -1}), {}, eps, turns, heads);
    std::vector<Tensor> mixed;
    for (const Part& part : parts) {
      Tensor visible = part.seen;
      Maybe entries, picks;
      int64_t count = 0;
      if (compressor) {
        count = part.max_end / compressor->ratio;
        visible = visible.div(compressor->ratio, "floor");
        if (indexer && count > indexer->topk) picks = indexer->pick(h, latent, turns, visible, count, part);
        if (count) entries = compressor->entries;
      }
      const Tensor own = part.of(keys);
      mixed.push_back(opd::decode_attention(part.of(query), own, window, entries, sinks, part.slots, part.starts,
                                            part.lengths, part.pages, visible, picks, count));
      write_ring(window, own, part);
      mixed.back() = mixed.back().view({part.count(), heads, -1});
    }
    return mixed.size() == 1 ? mixed[0] : at::cat(mixed);
  }

  // [N, H, C] -> [N, D].
  Tensor project(const Tensor& mixed, const Tensor& turns) const {
    const Tensor rows = turn(mixed, turns, heads, true).view({mixed.size(0), groups, -1});
    const Tensor matrices = o_a_proj.view({groups, -1, rows.size(2)});
    Tensor ranks = opd::empty({rows.size(0), groups, matrices.size(1)}, rows.options()), turned = ranks.transpose(0, 1);
    opd::products(rows.transpose(0, 1), matrices.mT(), turned, false);
    return opd::linear(ranks.view({rows.size(0), -1}), o_b_proj);
  }

  // Of affinities [N, E] each token's K best with the bias, the best first, unless they are looked up; their
  // affinities.
  void route(const Tensor& scores, int64_t* chosen, float* weights) const {
    const float *score = scores.const_data_ptr<float>(), *added = bias ? bias->const_data_ptr<float>() : nullptr;
    std::vector<float> best(per_token);
    for (int64_t t = 0; t < scores.size(0); ++t, score += experts, chosen += per_token, weights += per_token) {
      if (added) {
        int64_t count = 0;
        for (int64_t e = 0; e < experts; ++e) {
          const float value = score[e] + added[e];
          if (count == per_token && !(value > best[count - 1])) continue;
          int64_t place = count < per_token ? count++ : count - 1;
          for (; place > 0 && value > best[place - 1]; --place) {
            best[place] = best[place - 1], chosen[place] = chosen[place - 1];
          }
          best[place] = value, chosen[place] = e;
        }
      }
      for (int64_t k = 0; k < per_token; ++k) weights[k] = score[chosen[k]];
    }
  }

  // The MoE: [N, D] -> [N, D]. `learned`: how many layers before this one choose their experts, as records count them.
  Tensor mix(const Tensor& x, const Tensor& token_ids, const std::string& path, const std::vector<Part>& parts,
             int64_t learned) const {
    const Tensor scores = opd::affinity(opd::linear(x, router), is_sigmoid);
    Tensor chosen =
        hash ? at::index_select(*hash, 0, token_ids) : opd::empty({x.size(0), per_token}, token_ids.options());
    Tensor weights = opd::empty({x.size(0), per_token}, x.options());
    route(scores, chosen.mutable_data_ptr<int64_t>(), weights.mutable_data_ptr<float>());
    if (!hash) {
      for (const Part& part : parts) part.keep(chosen, learned);
    }
    const Tensor sums = at::sum(weights, {-1}, true);  // torch's own order of additions, as in `Router`
    float* weight = weights.mutable_data_ptr<float>();
    for (int64_t t = 0; t < x.size(0); ++t, weight += per_token) {
      const float share = 1.f / (sums.const_data_ptr<float>()[t] + 1e-20f) * static_cast<float>(factor);
      for (int64_t k = 0; k < per_token; ++k) weight[k] *= share;
    }
    const auto [source, places, counts] = opd::expert_rows(chosen, experts);
    const at::IntArrayRef sizes(counts.const_data_ptr<int64_t>(), experts);
    const Tensor hidden = opd::swiglu(gate_up(at::index_select(x, 0, source), sizes, path), {}, limit);
    const Tensor routed = opd::gather(down(hidden, sizes, path), places, weights);
    return at::add(routed, opd::linear(opd::swiglu(opd::linear(x, shared_gate_up), {}, limit), shared_down));
  }
};

struct Step : torch::CustomClassHolder {
  Tensor embedding, final_norm;
  HyperConnection head;
  int64_t streams;
  double eps;
  std::string path;
  std::vector<Layer> layers;
  int64_t num_bytes = 0;  // of the layers' weights
  std::vector<double> pace;  // of each thread: its share of what all do

  // `trunk`: embed_tokens.weight, norm.weight, hc_head.*; `path` as in opd/kernels/cpu.py.
  Step(const Tensors& trunk, const Sizes& sizes, const Numbers& numbers, std::string path)
      : embedding(named(trunk, "embed_tokens.weight")),
        final_norm(named(trunk, "norm.weight")),
        streams(named(sizes, "streams")),
        eps(named(numbers, "eps")),
        path(std::move(path)) {
    // The head's mapping as a site's, with nothing in the rows of post and residual.
    const Tensor fn = named(trunk, "hc_head.hc_fn"), base = named(trunk, "hc_head.hc_base"),
                 scale = named(trunk, "hc_head.hc_scale");
    const int64_t rest = streams + streams * streams;
    head = {opd::mixing_panel(at::cat({fn, at::zeros({rest, fn.size(1)}, fn.options())})),
            at::cat({base, at::zeros({rest}, base.options())}),
            at::cat({scale, at::zeros({2}, scale.options())}),
            eps,
            named(numbers, "hc_eps"),
            1};
  }

  // The next layer's weights, its cache (cache.window, cache.compressor.kv, ...), and what its RoPE turns by.
  void add_layer(const Tensors& tensors, const Sizes& sizes, const Numbers& numbers, const Tensor& frequencies) {
    layers.emplace_back(tensors, sizes, numbers, frequencies);
    for (const auto& entry : tensors) {
      if (entry.key().compare(0, 6, "cache.")) num_bytes += entry.value().nbytes();
    }
  }

  // The hidden state of every row's last new token, [rows of all parts, D], from token ids int64 [B, T] of each part;
  // the other arguments are its Extension's, and none, or for each part one, that `DeepseekV4.extend` has as `record`.
  Tensor extend(const std::vector<Tensor>& token_ids, const std::vector<Tensor>& slots,
                const std::vector<Tensor>& starts, const std::vector<Tensor>& lengths,
                const std::vector<Tensor>& positions, const std::vector<Tensor>& pages,
                const std::vector<int64_t>& max_ends, const std::vector<Tensor>& records) {
    std::vector<Part> parts;
    for (size_t i = 0; i < token_ids.size(); ++i) {
      parts.push_back({token_ids[i], slots[i], starts[i], lengths[i], positions[i], pages[i], max_ends[i]});
      if (!records.empty()) parts.back().record = records.at(i);
    }
    const std::vector<int64_t> cuts = shares(parts);
    const int64_t count = cuts.size() - 1;
    std::vector<double> seconds(count);
    Tensor out = opd::empty({cuts.back(), embedding.size(1)}, embedding.options());
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      // Threads of a pool know nothing of the caller's mode; what they make here is seen by nobody else.
      const c10::InferenceMode mode;
      for (int64_t i = begin; i < end; ++i) {
        const auto start = std::chrono::steady_clock::now();
        std::vector<Part> some;
        int64_t before = 0;
        for (const Part& part : parts) {
          const int64_t rows = part.token_ids.size(0), first = std::clamp<int64_t>(cuts[i] - before, 0, rows),
                        last = std::clamp<int64_t>(cuts[i + 1] - before, 0, rows);
          if (first < last) some.push_back(part.rows(first, last));
          before += rows;
        }
        const Tensor hidden = extend_rows(std::move(some));
        std::memcpy(out.mutable_data_ptr<float>() + cuts[i] * out.size(1), hidden.const_data_ptr<float>(),
                    hidden.nbytes());
        seconds[i] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      }
    });
    if (count == static_cast<int64_t>(pace.size())) learn_pace(seconds);
    return out;
  }

 private:
  // Where rows, counted over all parts, are cut into shares for the threads: of about as many tokens as each one's pace
  // allows.
  std::vector<int64_t> shares(const std::vector<Part>& parts) {
    int64_t rows = 0, tokens = 0;
    for (const Part& part : parts) rows += part.token_ids.size(0), tokens += part.token_ids.numel();
    const int64_t threads = at::get_num_threads();
    int64_t count = std::min<int64_t>({rows, tokens / LEAST_TOKENS, threads});
    if (tokens > count * MOST_TOKENS) count = (tokens / MOST_TOKENS + threads) / threads * threads;
    std::vector<int64_t> cuts{0};
    if (num_bytes <= SMALL && rows > 1 && count > 1) {
      if (static_cast<int64_t>(pace.size()) != threads) pace.assign(threads, 1. / threads);
      std::vector<double> goals;  // tokens before the end of each share
      for (int64_t i = 0; i < count; ++i) {
        goals.push_back((i ? goals.back() : 0) + tokens * (count == threads ? pace[i] : 1. / count));
      }
      int64_t row = 0, done = 0, before = 0, most = 0;
      for (const Part& part : parts) {
        const int64_t width = part.token_ids.size(1);
        for (int64_t b = 0; b < part.token_ids.size(0); ++b, ++row, done += width) {
          const int64_t share = cuts.size();
          if (share < count && row > cuts.back() && done + width / 2 >= goals[share - 1]) {
            most = std::max(most, done - before), before = done;
            cuts.push_back(row);
          }
        }
      }
      most = std::max(most, tokens - before);
      if (most * count > tokens * 3 / 2) cuts.resize(1);  // one row outweighs the others: threads share its products
    }
    cuts.push_back(rows);
    return cuts;
  }

  // Rows differ in what they cost, older ones see more, and so do threads: the one that called has just run something
  // else. Who was late gets less the next time. Results do not depend on who computes them.
  void learn_pace(const std::vector<double>& seconds) {
    double mean = 0, sum = 0;
    for (const double value : seconds) mean += value / seconds.size();
    for (size_t i = 0; i < pace.size(); ++i) {
      pace[i] *= 1 + PATIENCE * std::clamp(mean / seconds[i] - 1, -.5, .5);
      pace[i] = std::clamp(pace[i], .7 / pace.size(), 1.3 / pace.size());
      sum += pace[i];
    }
    for (double& value : pace) value /= sum;
  }

  Tensor extend_rows(std::vector<Part> parts) {
    int64_t count = 0, rows = 0;
    std::vector<Tensor> all_ids, all_positions;
    for (Part& part : parts) {
      part.batch = part.token_ids.size(0), part.tokens = part.token_ids.size(1), part.first = count;
      part.pages = part.pages.contiguous(), part.positions = part.positions.contiguous();
      part.seen = part.positions;
      if (part.tokens > 1) {
        part.seen = at::minimum(part.positions, at::add(part.starts, part.lengths).sub_(1).unsqueeze(1));
      }
      part.seen = at::add(part.seen, 1);
      all_ids.push_back(part.token_ids.reshape({-1})), all_positions.push_back(part.positions.view({-1}));
      count += part.count(), rows += part.batch;
    }
    Tensor ids = at::cat(all_ids), positions = at::cat(all_positions), last = opd::empty({rows}, ids.options());
    int64_t* to = last.mutable_data_ptr<int64_t>();
    for (const Part& part : parts) {
      const int64_t* length = part.lengths.const_data_ptr<int64_t>();
      for (int64_t b = 0; b < part.batch; ++b) *to++ = part.first + b * part.tokens + length[b] - 1;
    }
    Tensor x = at::index_select(embedding, 0, ids).unsqueeze(0).expand({streams, count, -1}).contiguous();
    Tensor frequencies, turns;
    int64_t learned = 0;
    for (Layer& layer : layers) {
      if (!layer.frequencies.is_same(frequencies)) {
        frequencies = layer.frequencies, turns = turns_at(positions, frequencies);
      }
      auto site = layer.attn_hc.collapse(x);
      // Other tokens leave no more than their keys in the last layer, unless somebody asks for their experts.
      const bool ends_only = &layer == &layers.back() && rows < count && (layer.hash || !parts[0].record.defined());
      const Tensor h = norm(site.hidden, layer.input_norm, eps);
      Tensor mixed = layer.attend(h, turns, parts, ends_only ? Maybe(last) : Maybe());
      if (ends_only) {
        x = at::index_select(x, 1, last);
        site.post = at::index_select(site.post, 1, last), site.residual = at::index_select(site.residual, 2, last);
        turns = at::index_select(turns, 0, last), ids = at::index_select(ids, 0, last);
      }
      x = opd::expand(x, layer.project(mixed, turns), site.post, site.residual);
      site = layer.ffn_hc.collapse(x);
      mixed = layer.mix(norm(site.hidden, layer.post_norm, eps), ids, path, parts, learned);
      x = opd::expand(x, mixed, site.post, site.residual);
      learned += !layer.hash;
    }
    if (x.size(1) > rows) x = at::index_select(x, 1, last);
    return norm(head.collapse(x).hidden, final_norm, eps);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(opd, library) {
  library.class_<Step>("Step")
      .def(torch::init<const Tensors&, const Sizes&, const Numbers&, std::string>())
      .def("add_layer", &Step::add_layer)
      .def("extend", &Step::extend);
}
