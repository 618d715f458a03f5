//! Vectors of whole numbers, for pages of keys and values that are stored in few bits.
//!
//! Products of 16-bit numbers are added up in 32 bits, which is exact, so that every instruction set and every order gives the same sum.

/// Vectors of 32-bit lanes, each also seen as two 16-bit numbers or four bytes. Four neighbouring lanes are a block.
///
/// # Safety
/// Every function asks for the instruction set; those with pointers ask for as many valid numbers as they name.
pub(crate) unsafe trait Words {
    /// Lanes of a vector: a multiple of 4 that divides 16.
    const N: usize;
    /// Whether 16-bit numbers are multiplied with bytes as two bytes each.
    const PLANES: bool;
    /// A vector.
    type I: Copy;

    /// The same in all lanes.
    ///
    /// # Safety
    /// The instruction set is available.
    unsafe fn splat(x: u32) -> Self::I;
    /// Reads `N` little-endian lanes.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn load(p: *const u8) -> Self::I;
    /// Writes `N` little-endian lanes.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn store(p: *mut u8, v: Self::I);
    /// Sixteen bytes of each of `N` rows, `row` bytes apart, four in each vector: a row's in its lane.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn columns(p: *const u8, row: usize) -> [Self::I; 4];
    /// `N` bytes of each of four rows: a lane has one of each.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn rows(p: [*const u8; 4]) -> Self::I;
    /// Exchanges byte `i` of lane `j` of a block with byte `j` of its lane `i`.
    ///
    /// # Safety
    /// The instruction set is available.
    unsafe fn turn(v: Self::I) -> Self::I;
    /// Lanes shifted to the left.
    ///
    /// # Safety
    /// The instruction set is available.
    unsafe fn shl<const BITS: u32>(v: Self::I) -> Self::I;
    /// Lanes shifted to the right.
    ///
    /// # Safety
    /// The instruction set is available.
    unsafe fn shr<const BITS: u32>(v: Self::I) -> Self::I;
    /// The bits that one of them has.
    ///
    /// # Safety
    /// The instruction set is available.
    unsafe fn xor(a: Self::I, b: Self::I) -> Self::I;
    /// Sums of bytes.
    ///
    /// # Safety
    /// The instruction set is available.
    unsafe fn add8(a: Self::I, b: Self::I) -> Self::I;
    /// Sums.
    ///
    /// # Safety
    /// The instruction set is available.
    unsafe fn add(a: Self::I, b: Self::I) -> Self::I;
    /// The bits that both have.
    ///
    /// # Safety
    /// The instruction set is available.
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    /// Sums of 16-bit numbers.
    ///
    /// # Safety
    /// The instruction set is available.
    unsafe fn add16(a: Self::I, b: Self::I) -> Self::I;
    /// `sum`, and the two products of signed 16-bit numbers in each lane.
    ///
    /// # Safety
    /// The instruction set is available.
    unsafe fn dot(sum: Self::I, a: Self::I, b: Self::I) -> Self::I;
    /// Two parts of sums, and in each lane four products of the unsigned bytes `u` with signed 16-bit numbers, of which `x` has the upper
    /// and the lower bytes, both signed, or, if there are no [`Words::PLANES`], numbers 0 and 2 and numbers 1 and 3.
    ///
    /// # Safety
    /// The instruction set is available.
    unsafe fn dot_words(sums: [Self::I; 2], u: Self::I, x: [Self::I; 2]) -> [Self::I; 2];
    /// What both parts are together.
    ///
    /// # Safety
    /// The instruction set is available.
    unsafe fn join(sums: [Self::I; 2]) -> Self::I;
    /// The same of 16-bit numbers `x`, none below zero, of which both bytes are unsigned, and the signed bytes `s`.
    ///
    /// # Safety
    /// The instruction set is available.
    unsafe fn dot_signed(sums: [Self::I; 2], x: [Self::I; 2], s: Self::I) -> [Self::I; 2];
    /// `sum`, and in each lane four products of the unsigned bytes `u` and the signed bytes `s`, of which neighbours fit 16 bits together.
    ///
    /// # Safety
    /// The instruction set is available.
    unsafe fn dot_bytes(sum: Self::I, u: Self::I, s: Self::I) -> Self::I;
    /// 16 products of `x` and `y`, rounded to the nearest byte; they are below 255.5.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn round_bytes(x: *const f32, y: *const f32, to: &mut [u32; 4]);
    /// 16 products of `x` and `y`, rounded to the nearest 16-bit number, as [`Words::dot_signed`] wants them; they are below 32,767.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn round_words(x: *const f32, y: *const f32, to: &mut [[u32; 2]; 4]);
    /// `N` products of `x` and `y`, rounded to the nearest 16-bit number, as pairs that fill a block each: numbers 0 and 2 of the
    /// block's four, and numbers 1 and 3. They are below `2^15`.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn round_fours(x: *const f32, y: *const f32) -> [Self::I; 2];
    /// 16 products of `x` and `y`, rounded in the same way, as 8 pairs of what is 8 apart.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn round_halves(x: *const f32, y: *const f32, to: &mut [u32; 8]);
    /// `to += a * v`, `N` of them.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn add_scaled(to: *mut f32, v: Self::I, a: f32);
    /// `to += v * (d * a)`, `N` of them.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn add_products(to: *mut f32, v: Self::I, d: *const f32, a: f32);
    /// The sums of all blocks, times `scale`, and `add`: lane `t` of blocks belongs to token `2 t` in `sums[0]`, to the one behind it in
    /// `sums[1]`, and in the others to those 8 behind.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn tokens(sums: [Self::I; 4], scale: f32, add: f32, to: &mut [f32; 16]);
}

/// Added to a number below `2^22`, it leaves the nearest whole number in the lowest bits.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// Plain Rust, a vector of one block.
pub(crate) struct Block;

impl Block {
    /// The two 16-bit numbers of a lane.
    fn halves(x: u32) -> [i32; 2] {
        [x as i16, (x >> 16) as i16].map(i32::from)
    }

    /// A lane of two numbers, of which the lower 16 bits are used.
    fn pair(low: u32, high: u32) -> u32 {
        low & 0xffff | high << 16
    }

    fn each(a: [u32; 4], b: [u32; 4], f: impl Fn(u32, u32) -> u32) -> [u32; 4] {
        std::array::from_fn(|i| f(a[i], b[i]))
    }

    /// `x * y`, rounded.
    unsafe fn round<const N: usize>(x: *const f32, y: *const f32) -> [u32; N] {
        // SAFETY: by the caller.
        std::array::from_fn(|i| unsafe { (*x.add(i) * *y.add(i) + ROUND).to_bits() })
    }
}

// SAFETY: no instructions are needed.
unsafe impl Words for Block {
    const N: usize = 4;
    const PLANES: bool = false;
    type I = [u32; 4];

    unsafe fn splat(x: u32) -> [u32; 4] {
        [x; 4]
    }
    unsafe fn load(p: *const u8) -> [u32; 4] {
        // SAFETY: by the caller.
        let bytes = unsafe { p.cast::<[[u8; 4]; 4]>().read_unaligned() };
        bytes.map(u32::from_le_bytes)
    }
    unsafe fn store(p: *mut u8, v: [u32; 4]) {
        // SAFETY: by the caller.
        unsafe {
            p.cast::<[[u8; 4]; 4]>()
                .write_unaligned(v.map(u32::to_le_bytes))
        };
    }
    unsafe fn columns(p: *const u8, row: usize) -> [[u32; 4]; 4] {
        // SAFETY: by the caller.
        let rows: [_; 4] = std::array::from_fn(|t| unsafe { Self::load(p.add(t * row)) });
        std::array::from_fn(|i| rows.map(|row| row[i]))
    }
    unsafe fn rows(p: [*const u8; 4]) -> [u32; 4] {
        // SAFETY: by the caller.
        let rows = p.map(|p| unsafe { p.cast::<[u8; 4]>().read_unaligned() });
        std::array::from_fn(|i| u32::from_le_bytes(rows.map(|row| row[i])))
    }
    unsafe fn turn(v: [u32; 4]) -> [u32; 4] {
        let v = v.map(u32::to_le_bytes);
        std::array::from_fn(|j| u32::from_le_bytes(v.map(|lane| lane[j])))
    }
    unsafe fn shl<const BITS: u32>(v: [u32; 4]) -> [u32; 4] {
        v.map(|x| x << BITS)
    }
    unsafe fn shr<const BITS: u32>(v: [u32; 4]) -> [u32; 4] {
        v.map(|x| x >> BITS)
    }
    unsafe fn xor(a: [u32; 4], b: [u32; 4]) -> [u32; 4] {
        Self::each(a, b, |a, b| a ^ b)
    }
    unsafe fn add8(a: [u32; 4], b: [u32; 4]) -> [u32; 4] {
        Self::each(a, b, |a, b| {
            let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
            u32::from_le_bytes(std::array::from_fn(|i| a[i].wrapping_add(b[i])))
        })
    }
    unsafe fn add(a: [u32; 4], b: [u32; 4]) -> [u32; 4] {
        Self::each(a, b, u32::wrapping_add)
    }
    unsafe fn and(a: [u32; 4], b: [u32; 4]) -> [u32; 4] {
        Self::each(a, b, |a, b| a & b)
    }
    unsafe fn add16(a: [u32; 4], b: [u32; 4]) -> [u32; 4] {
        let high = |a: u32, b: u32| (a >> 16).wrapping_add(b >> 16);
        Self::each(a, b, |a, b| Self::pair(a.wrapping_add(b), high(a, b)))
    }
    unsafe fn dot(sum: [u32; 4], a: [u32; 4], b: [u32; 4]) -> [u32; 4] {
        std::array::from_fn(|i| {
            let ([a0, a1], [b0, b1]) = (Self::halves(a[i]), Self::halves(b[i]));
            sum[i].wrapping_add((a0 * b0 + a1 * b1) as u32)
        })
    }
    unsafe fn dot_words(sums: [[u32; 4]; 2], u: [u32; 4], x: [[u32; 4]; 2]) -> [[u32; 4]; 2] {
        let pairs = [u, u.map(|u| u >> 8)].map(|u| u.map(|u| u & 0x00ff_00ff));
        // SAFETY: nothing is asked for.
        std::array::from_fn(|i| unsafe { Self::dot(sums[i], pairs[i], x[i]) })
    }
    unsafe fn join([a, b]: [[u32; 4]; 2]) -> [u32; 4] {
        Self::each(a, b, u32::wrapping_add)
    }
    unsafe fn dot_signed(sums: [[u32; 4]; 2], x: [[u32; 4]; 2], s: [u32; 4]) -> [[u32; 4]; 2] {
        let word = |s: u32, i: u32| i32::from((s >> (8 * i)) as i8).cast_unsigned();
        let pairs = [0, 1].map(|i| s.map(|s| Self::pair(word(s, i), word(s, i + 2))));
        // SAFETY: nothing is asked for.
        std::array::from_fn(|i| unsafe { Self::dot(sums[i], pairs[i], x[i]) })
    }
    unsafe fn dot_bytes(sum: [u32; 4], u: [u32; 4], s: [u32; 4]) -> [u32; 4] {
        std::array::from_fn(|i| {
            let products = u[i].to_le_bytes().into_iter().zip(s[i].to_le_bytes());
            let products = products.map(|(u, s)| i32::from(u) * i32::from(s.cast_signed()));
            sum[i].wrapping_add_signed(products.sum())
        })
    }
    unsafe fn round_bytes(x: *const f32, y: *const f32, to: &mut [u32; 4]) {
        // SAFETY: by the caller.
        let v = unsafe { Self::round::<16>(x, y) };
        for (to, v) in to.iter_mut().zip(v.as_chunks::<4>().0) {
            *to = u32::from_le_bytes(v.map(|x| x as u8));
        }
    }
    unsafe fn round_words(x: *const f32, y: *const f32, to: &mut [[u32; 2]; 4]) {
        // SAFETY: by the caller.
        let v = unsafe { Self::round::<16>(x, y) };
        for (to, v) in to.iter_mut().zip(v.as_chunks::<4>().0) {
            *to = [Self::pair(v[0], v[2]), Self::pair(v[1], v[3])];
        }
    }
    unsafe fn round_fours(x: *const f32, y: *const f32) -> [[u32; 4]; 2] {
        // SAFETY: by the caller.
        let v = unsafe { Self::round::<4>(x, y) };
        [[Self::pair(v[0], v[2]); 4], [Self::pair(v[1], v[3]); 4]]
    }
    unsafe fn round_halves(x: *const f32, y: *const f32, to: &mut [u32; 8]) {
        // SAFETY: by the caller.
        let v = unsafe { Self::round::<16>(x, y) };
        *to = std::array::from_fn(|i| Self::pair(v[i], v[i + 8]));
    }
    unsafe fn add_scaled(to: *mut f32, v: [u32; 4], a: f32) {
        for (i, x) in v.into_iter().enumerate() {
            // SAFETY: by the caller.
            unsafe { *to.add(i) += a * x.cast_signed() as f32 };
        }
    }
    unsafe fn add_products(to: *mut f32, v: [u32; 4], d: *const f32, a: f32) {
        for (i, x) in v.into_iter().enumerate() {
            // SAFETY: by the caller.
            unsafe { *to.add(i) += *d.add(i) * a * x.cast_signed() as f32 };
        }
    }
    unsafe fn tokens(sums: [[u32; 4]; 4], scale: f32, add: f32, to: &mut [f32; 16]) {
        for (t, to) in to.iter_mut().enumerate() {
            let sum = sums[t / 8 * 2 + t % 2][t % 8 / 2].cast_signed();
            *to = sum as f32 * scale + add;
        }
    }
}
