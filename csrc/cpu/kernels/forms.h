// Screening: the products of a tile, of large blocks by Winograd's form of Strassen's algorithm: seven products of
// quarters in place of eight. Included by kernels.cpp alone, inside its namespace.
//
// The products are sums of integers modulo 2^32, where the algorithm is exact: no bit of a result tells whether it ran.
// Cut the words of a block in two (left, right), its anchors A and its candidates C as well (first, second):
//   A = [a b]    C = [p q]
//       [c d]        [r s]
// The products of anchors and candidates, A C^T, come from seven of quarters:
//   f1 = c + d    f2 = f1 - a    f3 = b - f2    f4 = a - c        forms of the anchors
//   g1 = r - p    g2 = s - g1    g3 = q - g2    g4 = s - r        and of the candidates
//   x = a p^T     y = f1 g1^T    u = x + f2 g2^T    v = u + f4 g4^T
//   first anchors:     x + b q^T           u + y + f3 s^T         with the first, with the second candidates
//   second anchors:    v + d g3^T          v + y
// All rows of a block take part in each form: one whose integers were too large would spoil the products of others.
// A form has up to four terms, one of two levels sixteen: pack.h keeps the integers small enough for them to fit in 16
// bits (integer_most). A level adds eight forms and four sums of a quarter, which pays where quarters are large.
// Source: V. Strassen, "Gaussian elimination is not optimal", 1969; S. Winograd, "On multiplication of 2 x 2 matrices",
// 1971.
#pragma once

// Panels of a quarter's words, `stride` words apart.
struct Quarter {
  const std::uint32_t* words;
  std::int64_t stride;
};

// out = kOp(left, right), panels of `words` words one after the other. out may be the words of either.
template <I16 (*kOp)(I16, I16)>
SN_FORCE_INLINE void combine(std::int64_t panels, std::int64_t words, const Quarter& left, const Quarter& right,
                             std::uint32_t* out) {
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    for (std::int64_t at = 0; at < words * kPanel; at += kPanel) {
      i_store(out + panel * words * kPanel + at,
              kOp(i_load(left.words + panel * left.stride + at), i_load(right.words + panel * right.stride + at)));
    }
  }
}

// out = left + right, and + sums where there are any.
SN_FORCE_INLINE void add_sums(std::int64_t rows, std::int64_t columns, Sums left, Sums right, Sums sums, Sums out) {
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t column = 0; column < columns; column += kLanes) {
      I16 sum = i_add(i_load(left.from(r, column).at), i_load(right.from(r, column).at));
      if (sums.at != nullptr) sum = i_add(sum, i_load(sums.from(r, column).at));
      i_store(out.from(r, column).at, sum);
    }
  }
}

// out = sums + the products of a block, whose rows and columns are multiples of kPanel << levels and whose words are
// one of 1 << levels. out may be `sums`. scratch: form_words() of the block.
void multiply_forms(int levels, const Block& block, Sums sums, Sums out, std::uint32_t* scratch) {
  if (levels == 0) return multiply_block<false>(block, false, sums, Ends{}, out, NoPrefetch{});
  const std::int64_t rows = block.rows / 2;
  const std::int64_t columns = block.columns / 2;
  const std::int64_t words = block.words / 2;
  const std::int64_t stride = words * kPanel;

  std::uint32_t* const f_words = scratch;
  std::uint32_t* const g_words = f_words + rows * words;
  const Sums x{reinterpret_cast<std::int32_t*>(g_words + columns * words), columns + kPanel};
  const Sums y{x.at + rows * x.pitch, x.pitch};
  std::uint32_t* const deeper = reinterpret_cast<std::uint32_t*>(y.at + rows * y.pitch);

  const Quarter a{block.anchors, block.anchor_stride};
  const Quarter b{a.words + stride, a.stride};
  const Quarter c{a.words + rows / kPanel * a.stride, a.stride};
  const Quarter d{c.words + stride, a.stride};
  const Quarter p{block.candidates, block.candidate_stride};
  const Quarter q{p.words + stride, p.stride};
  const Quarter r{p.words + columns / kPanel * p.stride, p.stride};
  const Quarter s{r.words + stride, p.stride};
  const Quarter f{f_words, stride};
  const Quarter g{g_words, stride};
  const auto minus_to_f = [&](const Quarter& left, const Quarter& right) {
    combine<i_sub_pairs>(rows / kPanel, words, left, right, f_words);
  };
  const auto minus_to_g = [&](const Quarter& left, const Quarter& right) {
    combine<i_sub_pairs>(columns / kPanel, words, left, right, g_words);
  };
  const auto multiply = [&](const Quarter& anchors, const Quarter& candidates, Sums from, Sums to) {
    const Block quarter{anchors.words, anchors.stride, candidates.words, candidates.stride, rows, columns, words};
    multiply_forms(levels - 1, quarter, from, to, deeper);
  };
  constexpr Sums kNone{nullptr, 0};
  const bool begun = sums.at != nullptr;
  const auto sums_from = [&](std::int64_t row, std::int64_t column) { return begun ? sums.from(row, column) : kNone; };
  const Sums first_second = out.from(0, columns);
  const Sums second_first = out.from(rows, 0);

  multiply(a, p, kNone, x);
  if (begun) add_sums(rows, columns, x, sums, kNone, out);
  multiply(b, q, begun ? out : x, out);
  combine<i_add_pairs>(rows / kPanel, words, c, d, f_words);  // f1
  minus_to_g(r, p);                                           // g1
  multiply(f, g, kNone, y);
  minus_to_f(f, a);      // f2
  minus_to_g(s, g);      // g2
  multiply(f, g, x, x);  // u
  add_sums(rows, columns, x, y, sums_from(0, columns), first_second);
  minus_to_f(b, f);  // f3
  multiply(f, s, first_second, first_second);
  minus_to_g(q, g);  // g3
  multiply(d, g, sums_from(rows, 0), second_first);
  minus_to_f(a, c);      // f4
  minus_to_g(s, r);      // g4
  multiply(f, g, x, x);  // v
  add_sums(rows, columns, x, second_first, kNone, second_first);
  add_sums(rows, columns, x, y, sums_from(rows, columns), out.from(rows, columns));
}

// products[r * tile.pitch + c] = A_(row + r) . A_(column + c) of a tile or a part of one.
template <bool kBytes>
void multiply_part(const Screen& screen, const Tile& tile, const Tile& next, float* products, std::uint32_t* scratch) {
  Block block{screen.anchors.packed + tile.row / kPanel * screen.panel_stride,
              screen.panel_stride,
              screen.candidates.packed + tile.column / kPanel * screen.panel_stride,
              screen.panel_stride,
              tile.rows,
              tile.columns,
              screen.words};
  const Ends ends{screen.anchors.start + tile.row, screen.anchors.scale + tile.row,
                  screen.candidates.scale + tile.column};
  const Sums out{reinterpret_cast<std::int32_t*>(products), tile.pitch};
  const auto part = [&](std::int64_t row, std::int64_t rows, std::int64_t column, std::int64_t columns) {
    if (rows == 0 || columns == 0) return;
    const Tile inner{tile.row + row, rows, tile.column + column, columns, tile.diagonal && row == column, tile.pitch};
    multiply_part<kBytes>(screen, inner, next, products + row * tile.pitch + column, scratch);
  };
  if constexpr (!kBytes) {
    // Of a tile on the diagonal the part beside it, and the two that are left.
    const std::int64_t half = tile.rows / 2 / kPanel * kPanel;
    if (tile.diagonal && levels_of(screen.forms, half, half, screen.words) > 0) {
      part(0, half, 0, half);
      part(0, half, half, tile.columns - half);
      part(half, tile.rows - half, half, tile.columns - half);
      return;
    }
    const int levels = tile.diagonal ? 0 : levels_of(screen.forms, tile.rows, tile.columns, screen.words);
    if (levels > 0) {
      const std::int64_t grain = kPanel << levels;
      block.rows = tile.rows / grain * grain;
      block.columns = tile.columns / grain * grain;
      // As many words at a time as form_words() counts, about evenly.
      const std::int64_t turns = (screen.words + kFormWords - 1) / kFormWords;
      const std::int64_t words_a_turn = ((screen.words + turns - 1) / turns + kFormGrain - 1) / kFormGrain * kFormGrain;
      Sums sums{nullptr, 0};
      for (std::int64_t word = 0; word < screen.words; word += words_a_turn) {
        block.words = screen.words - word < words_a_turn ? screen.words - word : words_a_turn;
        multiply_forms(levels_of(screen.forms, block.rows, block.columns, block.words), block, sums, out, scratch);
        block.anchors += block.words * kPanel;
        block.candidates += block.words * kPanel;
        sums = out;
      }
      for (std::int64_t r = 0; r < block.rows; ++r) {
        const F16 scale = f_set1(ends.row_scales[r]);
        for (std::int64_t column = 0; column < block.columns; column += kLanes) {
          const Sums at = out.from(r, column);
          f_store(reinterpret_cast<float*>(at.at),
                  i_scaled(i_load(at.at), f_mul(scale, f_load(ends.column_scales + column))));
        }
      }
      part(block.rows, tile.rows - block.rows, 0, tile.columns);
      part(0, block.rows, block.columns, tile.columns - block.columns);
      return;
    }
  }
  if constexpr (kPrefetches) {
    multiply_block<kBytes>(block, tile.diagonal, Sums{nullptr, 0}, ends, out, TilePrefetch(screen, tile, next));
  } else {
    multiply_block<kBytes>(block, tile.diagonal, Sums{nullptr, 0}, ends, out, NoPrefetch{});
  }
}

// The products of a tile. On the diagonal, vectors of which no pair is wanted are not set. next: the tile that this
// worker is likely to multiply next.
inline void tile_products(const Screen& screen, const Tile& tile, const Tile& next, float* products,
                          std::uint32_t* forms) {
#if defined(SN_CPU_BYTES)
  if (screen.bytes) return multiply_part<true>(screen, tile, next, products, forms);
#endif
  multiply_part<false>(screen, tile, next, products, forms);
}
